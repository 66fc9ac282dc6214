// The dialogs: a new run or more seeds, a server, the token.

import { request, token } from "./api.js";
import { byId, h, setText } from "./dom.js";
import { count, counted } from "./format.js";

const GZIPPED = { gz: "gzip", zst: "zstd" };
const FIRST_REFUSED = 20;

/** Runs the dialog `id`: `submit(form, signal)` sends it; an error that it throws is shown in the dialog. */
function ask(id, submit) {
  const dialog = byId(id);
  const form = dialog.querySelector("form");
  const problem = form.querySelector(".problem");
  const button = form.querySelector("[type=submit]");
  const sending = new AbortController();
  let busy = false;
  problem.hidden = true;
  form.querySelector(".cancel")?.addEventListener("click", () => dialog.close(), { signal: sending.signal });
  dialog.addEventListener("close", () => sending.abort(), { once: true });
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (busy) return;
    busy = true;
    problem.hidden = true;
    button.setAttribute("aria-disabled", "true");
    try {
      await submit(form, sending.signal);
    } catch (error) {
      if (!sending.signal.aborted) {
        problem.hidden = false;
        setText(problem, error.message);
        problem.scrollIntoView({ block: "nearest" });
        error.field?.focus();
      }
    }
    busy = false;
    button.removeAttribute("aria-disabled");
  };
  dialog.showModal();
  return dialog;
}

/** A mistake in what was typed, and the field that gets the focus. */
class Mistake extends Error {
  constructor(message, field) {
    super(message);
    this.field = field;
  }
}

/** Asks for a token, and calls `then` when there is one. */
export function askToken(message, then) {
  const dialog = byId("token-dialog");
  if (dialog.open) return;
  dialog.querySelector("form").reset();
  ask("token-dialog", (form) => {
    const field = form.elements.token;
    const given = field.value.trim();
    if (!given) throw new Mistake("Type or paste the token.", field);
    if (!/^[\x21-\x7e]+$/.test(given)) throw new Mistake("A token has letters, digits and signs, and no spaces.", field);
    token.set(given);
    form.reset();
    dialog.close();
    then();
  });
  const problem = dialog.querySelector(".problem");
  problem.hidden = !message;
  setText(problem, message);
}

/** Asks for a server's URL and adds it; `done(message)` is called then. */
export function askServer(done) {
  byId("server-dialog").querySelector("form").reset();
  const dialog = ask("server-dialog", async (form, signal) => {
    const url = form.elements.url.value.trim();
    if (!url) throw new Mistake("Type the server's URL, such as http://127.0.0.1:30000.", form.elements.url);
    await request("POST", "/v1/servers", { json: { url }, signal });
    dialog.close();
    done(`Added ${url}.`);
  });
}

/** Asks for seeds of `run`, or for those of a new run if it is null; `done(message, id)` is called at the end. */
export function askSeeds(run, done) {
  const form = byId("run-dialog").querySelector("form");
  const result = form.querySelector(".result");
  let id = run?.id ?? null;
  let outcome = null;
  form.reset();
  form.elements.close.checked = run === null;
  result.replaceChildren();
  name();
  const dialog = ask("run-dialog", async (_, signal) => {
    const fields = form.elements;
    const seeds = readSeeds(fields);
    if (id === null) {
      id = (await request("POST", "/v1/runs", { json: readRun(fields), signal })).id;
      outcome = `Created ${id}, which waits for seeds.`;
      name(); // the run exists now: a second try adds seeds to it
    }
    if (seeds !== null) {
      setText(result, "Sending the seeds.");
      const answer = await send(id, seeds, signal).finally(() => result.replaceChildren());
      outcome = summed(id, answer);
      if (answer.refused) return showRefused(form, outcome, answer);
      if (fields.close.checked) await request("POST", `/v1/runs/${encodeURIComponent(id)}/close`, { signal });
    } else if (run !== null) throw new Mistake("Paste seeds or choose a file.", fields.seeds);
    return dialog.close();
  });
  dialog.addEventListener("close", () => outcome && done(outcome, id), { once: true });

  function name() {
    for (const element of form.querySelectorAll(".new-only")) element.hidden = id !== null;
    setText(byId("run-dialog-title"), id === null ? "New run" : `Add seeds to ${id}`);
    setText(form.querySelector("[type=submit]"), id === null ? "Create the run" : "Add the seeds");
    setText(form.querySelector(".cancel"), "Cancel");
  }
}

function send(id, seeds, signal) {
  return request("POST", `/v1/runs/${encodeURIComponent(id)}/seeds`, { ...seeds, signal });
}

function readRun({ id, weight, priority, config }) {
  const wanted = { weight: Number(weight.value), priority: priority.value };
  if (!(wanted.weight > 0)) throw new Mistake("Weight: a number greater than 0.", weight);
  if (id.value.trim()) wanted.id = id.value.trim();
  if (config.value.trim()) {
    try {
      wanted.config = JSON.parse(config.value);
    } catch (error) {
      throw new Mistake(`Configuration: not valid JSON: ${error.message}`, config);
    }
  }
  return wanted;
}

function readSeeds({ seeds, file }) {
  const [chosen] = file.files;
  const pasted = seeds.value.trim();
  if (chosen && pasted) throw new Mistake("Seeds: paste them or choose a file, not both.", seeds);
  if (!chosen && !pasted) return null;
  const ending = chosen?.name.split(".").at(-1).toLowerCase();
  const encoding = GZIPPED[ending] ? { "Content-Encoding": GZIPPED[ending] } : {};
  const key = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return {
    body: chosen ?? `${pasted}\n`,
    headers: { "Content-Type": "application/x-ndjson", "Idempotency-Key": key, ...encoding },
  };
}

function summed(id, { accepted, duplicate, refused }) {
  const parts = [`accepted ${counted(accepted, "seed")}`];
  if (duplicate) parts.push(`skipped ${counted(duplicate, "duplicate")}`);
  if (refused) parts.push(`refused ${counted(refused, "line")}`);
  return `${id}: ${parts.join(", ")}.`;
}

function showRefused(form, outcome, answer) {
  const lines = answer.refused_lines.slice(0, FIRST_REFUSED);
  const more = answer.refused - lines.length;
  form.elements.seeds.value = "";
  form.elements.file.value = "";
  setText(form.querySelector(".cancel"), "Done");
  form.querySelector(".result").replaceChildren(
    h("p", {}, h("strong", { text: outcome }), " Correct these lines and send them again; the run was not closed."),
    h(
      "ul",
      {},
      ...lines.map(({ line, detail }) => h("li", { class: "text", text: `line ${line}: ${detail}` })),
      more > 0 ? h("li", { text: `and ${count(more)} more` }) : null,
    ),
  );
}
