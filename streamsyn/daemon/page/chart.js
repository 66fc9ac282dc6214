// A small chart of a value over time, as SVG. It keeps its lines at any width; its labels are HTML.

import { h, setAttribute, setText, svg } from "./dom.js";
import { clock, decimal } from "./format.js";

const WIDTH = 600;
const HEIGHT = 60;

/** Returns a figure for a chart; `draw` fills it. */
export function chart(title) {
  return h(
    "figure",
    { class: "chart" },
    h("figcaption", {}, h("span", { class: "name", text: title }), h("span", { class: "now" })),
    svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      svg("path", { class: "area" }),
      svg("path", { class: "line" }),
    ),
    h("div", { class: "scale" }, h("span", { class: "from" }), h("span", { class: "most" }), h("span", { class: "to" })),
  );
}

/**
 * Draws `points` ([Unix seconds, value], rising) into a figure of `chart`. Points further apart than `gap_s`
 * are not joined: nothing was measured in between. The scale begins at zero, or at the lowest value.
 */
export function draw(figure, points, gapS, { show = decimal, fromZero = true } = {}) {
  const [first, last] = [points[0], points.at(-1)];
  const values = points.map(([, value]) => value);
  const most = Math.max(...values, fromZero ? 0 : -Infinity);
  const least = fromZero ? 0 : Math.min(...values);
  const title = figure.querySelector(".name").textContent;
  const span = points.length ? Math.max(last[0] - first[0], 1) : 1;
  const x = (at) => (((at - first[0]) / span) * WIDTH).toFixed(1);
  const y = (value) => (HEIGHT - 2 - (most > least ? ((value - least) / (most - least)) * (HEIGHT - 6) : 0)).toFixed(1);
  let line = "";
  let area = "";
  for (const stretch of stretches(points, gapS)) {
    const path = stretch.map(([at, value]) => `${x(at)},${y(value)}`).join("L");
    line += `M${path}`;
    area += `M${x(stretch[0][0])},${HEIGHT}L${path}L${x(stretch.at(-1)[0])},${HEIGHT}Z`;
  }
  setAttribute(figure.querySelector(".line"), "d", line);
  setAttribute(figure.querySelector(".area"), "d", area);
  const now = points.length ? show(last[1]) : show(NaN);
  const range = points.length ? `${fromZero ? "" : `lowest ${show(least)}, `}highest ${show(most)}` : "nothing measured yet";
  setText(figure.querySelector(".now"), now);
  setText(figure.querySelector(".most"), range);
  setText(figure.querySelector(".from"), points.length > 1 ? clock(first[0]) : "");
  setText(figure.querySelector(".to"), points.length ? clock(last[0]) : "");
  const period = points.length > 1 ? ` from ${clock(first[0])} to ${clock(last[0])}` : "";
  setAttribute(figure.querySelector("svg"), "aria-label", `${title}${period}: now ${now}, ${range}`);
}

function stretches(points, gapS) {
  const found = [];
  for (const point of points) {
    const stretch = found.at(-1);
    if (stretch && point[0] - stretch.at(-1)[0] <= gapS) stretch.push(point);
    else found.push([point]);
  }
  return found;
}
