// The overview: what the daemon does now, its runs and its servers.

import { chart, draw } from "./chart.js";
import { byId, h, keyed, setAttribute, setText, svg } from "./dom.js";
import { bytes, count, counted, decimal, duration, percent, short } from "./format.js";

const ORDER = ["running", "failed", "paused", "stopped", "finished"];
const PAGE = 20;
const MAX_ABOUT = 160; // characters of an error in a table

const filters = { state: "", name: "", shown: PAGE };
let act = () => {};
let newest = null;

/** Prepares the page. `onAction(action, subject)` is called for buttons in tables. */
export function prepare(onAction) {
  act = onAction;
  byId("charts").append(chart("Outcomes per second"), chart("Output tokens per second"));
  byId("state-filter").append(...ORDER.map((state) => h("option", { value: state, text: state })));
  byId("state-filter").addEventListener("change", (event) => narrow({ state: event.target.value }));
  byId("name-filter").addEventListener("input", (event) => narrow({ name: event.target.value.trim().toLowerCase() }));
  byId("more-runs").addEventListener("click", () => narrow({ shown: filters.shown + PAGE }));
  const at = location.origin;
  setText(
    byId("curl"),
    `curl ${at}/v1/runs -d '{"id": "first"}' -H 'Content-Type: application/json'\n` +
      `curl ${at}/v1/runs/first/seeds -T seeds.jsonl -X POST -H 'Content-Type: application/x-ndjson'`,
  );
}

function narrow(change) {
  Object.assign(filters, { shown: PAGE }, change);
  if (newest) showRuns(newest);
}

/** Shows a state. */
export function show(state) {
  newest = state;
  showFacts(state);
  const [outcomes, tokens] = byId("charts").children;
  const { every_s: every, at, outcomes_per_s: perS, output_tokens_per_s: tokensPerS } = state.history;
  draw(outcomes, at.map((time, index) => [time, perS[index]]), every * 2.5);
  draw(tokens, at.map((time, index) => [time, tokensPerS[index]]), every * 2.5, { show: count });
  showRuns(state);
  showServers(state.servers);
}

/** Fills a list of facts: [name, value, unit, remark, share of a bar if it has one]. */
export function facts(list, items) {
  keyed(
    list,
    items,
    ([name]) => name,
    ([name]) =>
      h(
        "div",
        { class: "fact" },
        h("dt", { text: name }),
        h("dd", { class: "figure" }, h("span", {}), " ", h("span", { class: "unit" })),
        h("dd", { class: "remark" }),
      ),
    (element, [, value, unit, remark, share]) => {
      setText(element.children[1].firstElementChild, value);
      setText(element.children[1].lastElementChild, unit);
      setText(element.children[2], remark);
      if (share !== undefined && !element.querySelector("svg")) element.append(h("dd", {}, bar()));
      if (share !== undefined) fill(element.querySelector("svg"), share);
    },
  );
}

/** Returns a bar that `fill` sets; what it shows stands beside it as text. */
export function bar() {
  return svg(
    "svg",
    { class: "bar", viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { width: 100, height: 6, class: "whole" }),
    svg("rect", { width: 0, height: 6, class: "part" }),
  );
}

/** Sets the part of a bar to a share from 0 to 1. */
export function fill(drawn, share) {
  const width = Number.isFinite(share) ? 100 * Math.min(1, Math.max(0, share)) : 0;
  setAttribute(drawn.lastElementChild, "width", (width && Math.max(width, 0.8)).toFixed(1));
}

/** Returns the badge of a state; its shape repeats what its colour means. */
export function badge(state) {
  return h("span", { class: `badge ${state}`, text: state });
}

/** Sets the state of a badge. */
export function setBadge(element, state) {
  setAttribute(element, "class", `badge ${state}`);
  setText(element, state);
}

function showFacts(state) {
  const { servers, runs, disk, rates, tokens } = state;
  const sum = (items, of) => items.reduce((total, item) => total + (of(item) ?? 0), 0);
  const [inFlight, cap] = [sum(servers, (one) => one.in_flight), sum(servers, (one) => one.cap)];
  const usable = servers.filter((one) => one.state === "usable").length;
  const achieved = tokens.cached / tokens.prompt;
  const batches = state.batches.running ?? 0;
  const [running, total] = [state.states.running ?? 0, sum(Object.values(state.states), Number)];
  const ofBatches = batches ? `; ${counted(batches, "batch", "batches")} running` : "";
  const planned = cachedOf(tokens.planned_cached / tokens.prompt, tokens.prompt);
  const room = `of ${bytes(disk.total_bytes)}; runs wait below ${bytes(disk.min_free_bytes)}`;
  facts(byId("facts"), [
    ["Runs", count(running), "running", `${count(total)} in total${ofBatches}`],
    ["Outcomes", decimal(rates.outcomes_per_s), "per second", `${counted(sum(runs, (run) => run.counts.waiting), "seed")} waiting`],
    ["Output", count(rates.output_tokens_per_s), "tokens/s", `${short(tokens.completion)} tokens since the start`],
    ["In flight", count(inFlight), `of ${count(cap)}`, `${usable} of ${counted(servers.length, "server")} usable`, cap ? inFlight / cap : 0],
    ["Prefix cache", percent(achieved), "achieved", planned, achieved],
    ["Disk", bytes(disk.free_bytes), "free", room, 1 - disk.free_bytes / disk.total_bytes],
  ]);
}

/** Says which share of the prompt tokens was planned to come from the cache, if that is known. */
export function cachedOf(planned, prompt) {
  if (!prompt) return "nothing sent yet";
  return `${Number.isFinite(planned) ? `${percent(planned)} planned, ` : ""}of ${short(prompt)} prompt tokens`;
}

function showRuns({ runs, states, at }) {
  const total = Object.values(states).reduce((sum, number) => sum + number, 0);
  byId("no-runs").hidden = total > 0;
  byId("filters").hidden = total === 0;
  for (const option of byId("state-filter").options) {
    const number = option.value ? (states[option.value] ?? 0) : total;
    setText(option, `${option.value || "all"} (${count(number)})`);
  }
  const wanted = runs
    .filter((run) => (!filters.state || run.state === filters.state) && run.id.includes(filters.name))
    .sort((one, other) => ORDER.indexOf(one.state) - ORDER.indexOf(other.state) || other.created_at - one.created_at);
  const shown = wanted.slice(0, filters.shown);
  byId("runs-table").hidden = shown.length === 0;
  byId("more-runs").hidden = wanted.length <= shown.length;
  const notes = [];
  if (total > 0 && !wanted.length) notes.push("No run matches.");
  if (wanted.length > shown.length) notes.push(`${count(shown.length)} of ${count(wanted.length)} shown.`);
  if (runs.length < total) notes.push(`This page knows the newest ${count(runs.length)} of ${count(total)} runs; GET /v1/runs lists all.`);
  setText(byId("runs-note"), notes.join(" "));
  keyed(byId("runs"), shown, (run) => run.id, makeRun, (row, run) => updateRun(row, run, at));
}

/** Returns how far a run is: outcomes, all drafts known so far, the share, and the seconds left. */
export function progress({ counts, rates, eta_s: eta }) {
  const done = counts.contexts + counts.rejects;
  const left = counts.waiting + counts.in_flight;
  const seconds = eta ?? (left && rates.outcomes_per_s ? left / rates.outcomes_per_s : null);
  return { done, total: done + left, share: done + left ? done / (done + left) : 0, left_s: left ? seconds : null };
}

const beginning = (text) => (text.length > MAX_ABOUT ? `${text.slice(0, MAX_ABOUT)} …` : text);

const cell = (name, className, ...children) =>
  h("td", { role: "cell", "data-name": name, class: className }, ...children);

function makeRun(run) {
  return h(
    "tr",
    { role: "row" },
    h(
      "th",
      { role: "rowheader", scope: "row" },
      h("a", { href: `#/runs/${encodeURIComponent(run.id)}`, text: run.id }),
      h("span", { class: "quiet about" }),
    ),
    cell("State", "state", badge(run.state)),
    cell("Done", "wide", h("span", {}), bar()),
    ...["Contexts", "Rejects", "Samples", "Waiting", "In flight", "Outcomes/s", "Time left"].map((name) => cell(name, "")),
    cell("", "act", h("button", { type: "button", class: "small" })),
  );
}

function updateRun(row, run) {
  const { done, total, share, left_s: left } = progress(run);
  const cells = row.children;
  setText(cells[0].lastElementChild, beginning(run.error ?? ""));
  setBadge(cells[1].firstElementChild, run.state);
  setText(cells[2].firstElementChild, `${count(done)} of ${count(total)}`);
  fill(cells[2].lastElementChild, share);
  const { contexts, rejects, samples, waiting, in_flight: inFlight } = run.counts;
  const active = run.state === "running";
  const values = [count(contexts), count(rejects), count(samples), count(waiting), count(inFlight)];
  values.push(active ? decimal(run.rates.outcomes_per_s) : "", active ? duration(left ?? NaN) : "");
  values.forEach((value, index) => setText(cells[index + 3], value));
  const button = cells[10].firstElementChild;
  const action = active ? "pause" : "resume";
  button.hidden = run.state === "finished";
  setText(button, active ? "Pause" : "Resume");
  setAttribute(button, "aria-label", `${active ? "Pause" : "Resume"}: ${run.id}`);
  button.onclick = () => act(action, run);
}

function showServers(servers) {
  byId("no-servers").hidden = servers.length > 0;
  byId("servers-table").hidden = servers.length === 0;
  keyed(byId("servers"), servers, (server) => server.url, makeServer, updateServer);
}

function makeServer(server) {
  return h(
    "tr",
    { role: "row" },
    h("th", { role: "rowheader", scope: "row" }, h("span", { text: server.url }), h("span", { class: "quiet about" })),
    cell("State", "state", badge(server.state)),
    cell("In flight of cap", "wide", h("span", {}), bar()),
    ...["Queued", "Tokens/s", "Answers", "Failed tries", "Cached, planned", "Cached, achieved"].map((name) => cell(name, "")),
    cell("", "act", h("button", { type: "button", class: "small" })),
  );
}

function updateServer(row, server) {
  const cells = row.children;
  setText(cells[0].lastElementChild, beginning(server.error ?? server.model));
  setBadge(cells[1].firstElementChild, server.state);
  setText(cells[2].firstElementChild, `${count(server.in_flight)} of ${count(server.cap)}`);
  fill(cells[2].lastElementChild, server.in_flight / server.cap);
  const values = [count(server.queue), count(server.tokens_per_s), count(server.completions), count(server.failures)];
  values.push(percent(server.planned_share), percent(server.cached_share));
  values.forEach((value, index) => setText(cells[index + 3], value));
  const button = cells[9].firstElementChild;
  const isLeaving = ["draining", "removing"].includes(server.state);
  setText(button, isLeaving ? "Use again" : "Drain");
  setAttribute(button, "aria-label", `${isLeaving ? "Use again" : "Drain"}: ${server.url}`);
  button.onclick = () => act(isLeaving ? "add-server" : "drain-server", server);
}
