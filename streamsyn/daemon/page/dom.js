// Making and updating elements. Every text becomes a text node; nothing here, or on the page, parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Returns an element. `props`: `on` maps events to listeners, `text` is its text; the rest are attributes. */
export function h(tag, props = {}, ...children) {
  return filled(document.createElement(tag), props, children);
}

/** Returns an SVG element; arguments as for `h`. */
export function svg(tag, props = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

function filled(element, { on = {}, text, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) setAttribute(element, name, value);
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  if (text !== undefined) element.append(visible(text));
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Sets an attribute if it differs; null, undefined and false remove it. */
export function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value === true ? "" : value);
}

/** Sets the text of an element if it differs, so that a selection in it survives. */
export function setText(element, text) {
  const wanted = visible(text);
  if (element.textContent !== wanted) element.textContent = wanted;
}

/**
 * Makes the children of `parent` those of `items`, in order. Elements are kept by key, so that focus, selections
 * and opened details survive an update.
 */
export function keyed(parent, items, keyOf, make, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const focused = document.activeElement;
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let element = known.get(key);
    known.delete(key);
    if (element === undefined) {
      element = make(item);
      element.dataset.key = key;
    }
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
    update?.(element, item);
  }
  for (const element of known.values()) element.remove();
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
}

const UNSAFE =
  // eslint-disable-next-line no-control-regex
  /[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)/gu;

/** Returns text with its control characters and changes of direction as escapes, such as `\x1b`. */
export function visible(text) {
  return String(text).replace(UNSAFE, (found) => {
    const code = found.codePointAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

const SHOWN = 6000;
const MORE = 100_000;

/** Returns a block of text for reading. Of a long text the beginning is shown, with a button for more. */
export function longText(text, className = "text", shown = SHOWN) {
  const whole = String(text);
  if (whole.length <= shown * 1.2) return h("div", { class: className, text: whole });
  let end = shown;
  const block = h("div", { class: className, text: whole.slice(0, end) });
  const button = h("button", { type: "button", class: "plain", on: { click: showMore } });
  const label = () => {
    const [more, all] = [Math.min(MORE, whole.length - end), whole.length].map((number) => number.toLocaleString("en-US"));
    setText(button, `Show ${more} more of ${all} characters`);
  };
  function showMore() {
    block.append(visible(whole.slice(end, end + MORE)));
    end += MORE;
    if (end >= whole.length) button.remove();
    else label();
  }
  label();
  return h("div", {}, block, button);
}
