// One run: its progress, its rejects with examples, and its last samples to read.

import { rows } from "./api.js";
import { chart, draw } from "./chart.js";
import { byId, h, keyed, longText, setAttribute, setText } from "./dom.js";
import { clock, count, counted, decimal, duration, percent, short, UNKNOWN } from "./format.js";
import { badge, bar, cachedOf, facts, fill, progress, setBadge } from "./overview.js";

const SAMPLES = 3;
const EXAMPLES = 100; // rejects that are searched for examples of each reason
const PER_REASON = 3;
const POINTS = 1800;

const BUTTONS = [
  { action: "pause", label: "Pause", states: ["running"] },
  { action: "resume", label: "Resume", states: ["paused", "stopped", "failed", "finished"] },
  { action: "drain", label: "Drain", states: ["running", "paused"] },
  { action: "close", label: "Close", states: ["running", "paused", "stopped"], when: (run) => run.accepting },
  { action: "retry", label: "Retry rejects", when: (run) => run.counts.rejects > 0 },
  { action: "seeds", label: "Add seeds", states: ["running", "paused"], when: (run) => run.accepting },
];

/** Throughput by run since the page was opened: [Unix seconds, outcomes/s, tokens/s]. */
const history = new Map();
const view = { id: null, run: null, samples: null, rejects: null, loading: new AbortController() };

/** Prepares the page. `onAction(action, run)` is called for the buttons. */
export function prepare(onAction) {
  byId("run-charts").append(chart("Outcomes per second"), chart("Output tokens per second"));
  byId("run-state").append(badge(""));
  const press = (action) => (event) => {
    if (event.currentTarget.getAttribute("aria-disabled") !== "true") onAction(action, view.run);
  };
  const button = ({ action, label }) =>
    h("button", { type: "button", "data-action": action, text: label, on: { click: press(action) } });
  byId("run-actions").append(...BUTTONS.map(button));
  const ifEnabled = (action) => ({ currentTarget }) => currentTarget.getAttribute("aria-disabled") !== "true" && action();
  byId("newer-samples").addEventListener("click", ifEnabled(loadSamples));
  byId("newer-rejects").addEventListener("click", ifEnabled(loadRejects));
}

/** Losses that consumers report, by run and consumer, since the page was opened: [Unix seconds, loss]. */
const losses = new Map();

/** Keeps the throughput of each running run and the losses of trainings, shown or not. */
export function remember({ at, runs }) {
  for (const { id, consumers } of runs) {
    for (const { name, metrics } of consumers.filter(isTraining)) rememberLoss(`${id} ${name}`, at, metrics.loss);
  }
  for (const run of runs) {
    if (run.state !== "running" && !history.has(run.id)) continue;
    const points = history.get(run.id) ?? [];
    const { outcomes_per_s: outcomes, output_tokens_per_s: tokens } = run.rates;
    points.push(run.state === "running" ? [at, outcomes, tokens] : [at, 0, 0]);
    if (points.length > POINTS) points.shift();
    history.set(run.id, points);
  }
  const known = new Set(runs.map((run) => run.id));
  for (const id of history.keys()) if (!known.has(id)) history.delete(id);
}

const isTraining = ({ metrics }) => metrics?.loss !== undefined;

function rememberLoss(key, at, loss) {
  const points = losses.get(key) ?? [];
  if (points.at(-1)?.[1] !== loss) points.push([at, loss]);
  if (points.length > POINTS) points.shift();
  losses.set(key, points);
}

/** Opens the view on the run `id`; null closes it. */
export function open(id) {
  view.loading.abort();
  Object.assign(view, { id, run: null, samples: null, rejects: null, loading: new AbortController() });
  for (const part of ["reading", "rejects", "consumers", "losses", "run-facts"]) byId(part).replaceChildren();
  for (const part of ["newer-samples", "newer-rejects"]) byId(part).hidden = true;
  setText(byId("run-title"), id ?? "");
}

/** Shows the run of the view, or that there is none. */
export function show(run) {
  const isNew = view.run === null;
  view.run = run;
  setBadge(byId("run-state").firstElementChild, run.state);
  showButtons(run);
  showAbout(run);
  showFacts(run);
  const points = history.get(run.id) ?? [];
  byId("run-throughput").hidden = points.length === 0;
  const [outcomes, tokens] = byId("run-charts").children;
  draw(outcomes, points.map(([at, value]) => [at, value]), 5);
  draw(tokens, points.map(([at, , value]) => [at, value]), 5, { show: count });
  showReasons(run);
  const wasEmpty = view.samples === -1 && lastReadable(run) !== null;
  if (isNew || wasEmpty) loadSamples();
  showNewer(run);
  showConsumers(run);
}

function showButtons(run) {
  for (const { action, states, when } of BUTTONS) {
    const button = byId("run-actions").querySelector(`[data-action=${action}]`);
    // Not `disabled`: a button that loses the focus by being pressed sends a keyboard back to the top.
    setAttribute(button, "aria-disabled", !((states?.includes(run.state) ?? true) && (when?.(run) ?? true)) && "true");
  }
}

function showAbout(run) {
  const labels = Object.entries(run.labels ?? {}).map(([name, value]) => `${name}: ${value}`);
  const about = [`created ${clock(run.created_at)}`, `weight ${decimal(run.weight)}`, `priority ${run.priority}`];
  about.push(run.accepting ? "accepts seeds" : "accepts no seeds", ...labels);
  setText(byId("run-about"), about.join(" · "));
  byId("run-error").hidden = !run.error;
  setText(byId("run-error"), run.error ? `${run.state === "failed" ? "Failed" : "Waiting"}: ${run.error}` : "");
}

function showFacts(run) {
  const { counts, rates, tokens, prefix } = run;
  const { done, total, share, left_s: left } = progress(run);
  const active = run.state === "running";
  const planned = cachedOf(prefix.planned, tokens.prompt);
  const achieved = prefix.achieved ?? tokens.cached / tokens.prompt;
  const written = `${short(tokens.completion)} tokens, ${short(tokens.wasted)} of them discarded`;
  const ended = `${counted(counts.contexts, "context")}, ${counted(counts.rejects, "reject")}`;
  facts(byId("run-facts"), [
    ["Done", percent(share), active && left !== null ? `${duration(left)} left` : "", `${count(done)} of ${counted(total, "draft")}`, share],
    ["Outcomes", active ? decimal(rates.outcomes_per_s) : UNKNOWN, "per second", ended],
    ["Samples", count(counts.samples), "", `of ${counted(counts.accepted, "accepted seed")}`],
    ["In flight", count(counts.in_flight), "", `${counted(counts.waiting, "seed")} waiting`],
    ["Output", active ? count(rates.output_tokens_per_s) : UNKNOWN, "tokens/s", written],
    ["Prefix cache", percent(achieved), "achieved", planned, achieved],
  ]);
}

function showNewer(run) {
  offer(byId("newer-samples"), view.samples, lastReadable(run), (newer) => `Show the latest (${count(newer)} newer)`);
  offer(byId("newer-rejects"), view.rejects, run.last.rejects, () => "Load newer examples");
}

/** Has a button offer what is newer than what was loaded; it keeps its place, so that it can keep the focus. */
function offer(button, loaded, last, label) {
  const newer = loaded === null ? 0 : (last ?? -1) - loaded;
  button.hidden = loaded === null || last === null;
  setText(button, newer > 0 ? label(newer) : "These are the latest");
  setAttribute(button, "aria-disabled", newer <= 0 && "true");
}

const lastReadable = ({ last }) => last.samples ?? last.contexts;

/** Asks for rows of the run of the view. What arrives after the view was closed is dropped: null. An error is shown by `fail`. */
async function load(what, ask, fail) {
  const { signal } = view.loading;
  try {
    return await ask(`/v1/runs/${encodeURIComponent(view.id)}`, signal);
  } catch (error) {
    if (!signal.aborted) fail(h("p", { class: "problem", text: `${what} could not be read: ${error.message}` }));
    return null;
  }
}

const behind = (seq, number) => (seq >= number ? `after=${seq - number}&` : "");

async function loadSamples() {
  const { run } = view;
  const parent = byId("reading");
  const kind = run.last.samples === null ? "contexts" : "samples";
  setText(byId("reading-title"), kind === "samples" || run.last.contexts === null ? "Last samples" : "Last contexts");
  const last = run.last[kind];
  if (last === null) {
    const yet = "Nothing to read yet. Samples appear as soon as the log holds enough contexts for one.";
    parent.replaceChildren(h("p", { class: "empty", text: run.state === "finished" ? "Nothing to read: no seed got a context." : yet }));
    view.samples = -1;
    return;
  }
  view.samples = last;
  const read = async (at, signal) => {
    const newest = (await rows(`${at}/${kind}?${behind(last, SAMPLES)}limit=${SAMPLES}`, signal)).reverse();
    if (kind === "contexts") return newest.map((context) => ({ context }));
    return Promise.all(newest.map(async (sample) => ({ sample, context: await contextOf(sample, at, signal) })));
  };
  const found = await load(`The last ${kind}`, read, (problem) => {
    parent.replaceChildren(problem);
    view.samples = last - 1; // so that the button to load them is there
  });
  if (found) parent.replaceChildren(...found.map(({ sample, context }, index) => reading(sample, context, index === 0)));
}

async function contextOf(sample, at, signal) {
  const seq = sample.context_seqs[sample.relevant_index];
  const [context] = await rows(`${at}/contexts?${behind(seq, 1)}limit=1`, signal);
  return context ?? null;
}

function reading(sample, context, isOpen) {
  const { task, instruction, id } = sample ?? context;
  const answer = sample ? sample.messages.at(-1).content : context.answer;
  const meta = [id];
  if (context) meta.push(counted(context.completion_tokens, "token"), context.model, ...(context.checks?.flags ?? []));
  if (sample) {
    meta.push(`passage ${sample.relevant_index + 1} of ${sample.context_seqs.length}`);
    meta.push(`${counted(sample.n_tokens, "token")} in total`);
  }
  const gone = h("p", { class: "quiet", text: "This context is not kept any more." });
  const opening = instruction.slice(0, 160) + (instruction.length > 160 ? " …" : "");
  return h(
    "details",
    { class: "reading", open: isOpen },
    h("summary", {}, h("strong", { text: task }), " ", h("span", { class: "text", text: opening })),
    h("p", { class: "meta quiet" }, ...meta.map((text) => h("span", { class: "text", text: String(text).slice(0, 120) }))),
    h(
      "div",
      { class: "body" },
      h("dl", {}, ...part("Instruction", longText(instruction, "text", 1500)), ...part("Answer", longText(answer, "text", 1500))),
      h("dl", {}, ...part("Context", context ? longText(context.context, "relevant text") : gone)),
    ),
    sample ? folded("The whole prompt", () => longText(sample.messages[0].content)) : null,
  );
}

const part = (name, content) => [h("dt", { text: name }), h("dd", {}, content)];

/** Returns details whose content is made when they are opened. */
function folded(title, make) {
  const details = h("details", {}, h("summary", { text: title }));
  details.addEventListener("toggle", () => details.children.length === 1 && details.append(make()));
  return details;
}

function showReasons(run) {
  const parent = byId("rejects");
  const reasons = Object.entries(run.rejects).filter(([, number]) => number > 0).sort((one, other) => other[1] - one[1]);
  if (!reasons.length) {
    keyed(parent, ["none"], String, () => h("p", { class: "empty", text: "No seed was rejected." }));
    return;
  }
  const most = reasons[0][1];
  keyed(
    parent,
    reasons,
    ([reason]) => `reason ${reason}`,
    ([reason]) =>
      h(
        "details",
        { class: "reason", on: { toggle: ({ target }) => target.open && !target.dataset.loaded && loadRejects() } },
        h("summary", {}, h("span", { class: "name", text: reason.replaceAll("_", " ") }), bar(), h("span", { class: "number" })),
        h("div", { class: "examples" }, h("p", { class: "quiet", text: "loading" })),
      ),
    (element, [, number]) => {
      const summary = element.firstElementChild;
      fill(summary.querySelector("svg"), number / most);
      setText(summary.lastElementChild, count(number));
    },
  );
}

async function loadRejects() {
  const { last } = view.run;
  const parts = [...byId("rejects").querySelectorAll(".reason")];
  view.rejects = last.rejects;
  const read = (at, signal) => rows(`${at}/rejects?${behind(last.rejects, EXAMPLES)}limit=${EXAMPLES}`, signal);
  const found = await load("The last rejects", read, (problem) => {
    for (const part of parts) part.lastElementChild.replaceChildren(problem.cloneNode(true));
    view.rejects = last.rejects - 1;
  });
  for (const part of found ? parts : []) {
    const reason = part.dataset.key.slice("reason ".length);
    const examples = found.filter((reject) => reject.reason === reason).slice(-PER_REASON).reverse();
    const none = h("p", { class: "quiet", text: `none among the last ${counted(found.length, "reject")}` });
    part.lastElementChild.replaceChildren(...(examples.length ? examples.map(example) : [none]));
    part.dataset.loaded = "yes";
  }
}

function example(reject) {
  const shown = (text) => longText(text, "text", 400);
  const attempts = reject.attempts?.length ?? 0;
  const where = [reject.origin, ...(reject.task ? [reject.task] : []), ...(attempts ? [counted(attempts, "attempt")] : [])];
  return h(
    "div",
    { class: "example" },
    h("p", { class: "quiet text", text: where.join(" · ") }),
    shown(reject.detail),
    reject.instruction ? h("dl", {}, ...part("Instruction", shown(reject.instruction)), ...part("Answer", shown(reject.answer ?? ""))) : null,
  );
}

function showConsumers({ id, consumers }) {
  const parent = byId("consumers");
  keyed(
    byId("losses"),
    consumers.filter(isTraining),
    ({ name }) => name,
    ({ name }) => chart(`Loss of ${name}`),
    (figure, { name }) => draw(figure, losses.get(`${id} ${name}`) ?? [], Infinity, { fromZero: false }),
  );
  if (!consumers.length) {
    const none = "None. A training or another reader that registers a name keeps its place here.";
    keyed(parent, ["none"], String, () => h("p", { class: "empty", text: none }));
    return;
  }
  keyed(parent, ["table"], String, makeConsumers);
  keyed(parent.querySelector("tbody"), consumers, (one) => one.name, makeConsumer, (row, one) => {
    const metrics = Object.entries(one.metrics ?? {}).map(([name, value]) => `${name} ${decimal(value)}`);
    const values = [one.kind, one.acked === null ? UNKNOWN : count(one.acked), count(one.lag), metrics.join(", ") || UNKNOWN];
    values.forEach((value, index) => setText(row.children[index + 1], value));
  });
}

const CONSUMER = ["Consumer", "Reads", "Done to row", "Rows behind", "Reports"];

function makeConsumers() {
  const heading = (name) => h("th", { role: "columnheader", scope: "col", text: name });
  return h(
    "table",
    { role: "table", "aria-labelledby": "consumers-title" },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ...CONSUMER.map(heading))),
    h("tbody", { role: "rowgroup" }),
  );
}

function makeConsumer(one) {
  return h(
    "tr",
    { role: "row" },
    h("th", { role: "rowheader", scope: "row", text: one.name }),
    ...CONSUMER.slice(1).map((name) => h("td", { role: "cell", "data-name": name })),
  );
}
