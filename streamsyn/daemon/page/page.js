// The page's entry: follows the daemon's states, and carries out what the buttons say.

import { follow, Refused, request, token } from "./api.js";
import { byId, h, keyed, setText } from "./dom.js";
import { askSeeds, askServer, askToken } from "./forms.js";
import { clock, count, counted, duration } from "./format.js";
import * as overview from "./overview.js";
import * as run from "./run.js";

const DONE = { pause: "Paused", resume: "Resumed", drain: "Draining", close: "Closed", retry: "Retrying the rejects of" };

const seen = { state: null, at: 0, goneSince: 0, next: 0 };
let runId = null;

const connection = follow({ onState: showState, onGone: showGone, onToken: wantToken });
overview.prepare(act);
run.prepare(act);
byId("skip").addEventListener("click", () => byId("main").focus());
byId("new-run").addEventListener("click", () => askSeeds(null, opened));
byId("first-run").addEventListener("click", () => askSeeds(null, opened));
byId("add-server").addEventListener("click", () => askServer(say));
byId("gone-try").addEventListener("click", () => connection.again());
byId("error-close").addEventListener("click", () => showError(""));
byId("forget").addEventListener("click", forget);
addEventListener("hashchange", route);
setInterval(showAges, 1000);
route();

function showState(state) {
  const returned = seen.goneSince > 0;
  Object.assign(seen, { state, at: Date.now(), goneSince: 0 });
  byId("connecting").hidden = true;
  byId("gone").hidden = true;
  byId("forget").hidden = !token.get();
  document.body.classList.remove("old");
  for (const note of document.querySelectorAll(".as-of")) setText(note, "");
  connected("live", `live, ${clock(state.at)}`);
  setText(byId("about"), `version ${state.version} · up ${duration(state.at - state.started_at)}`);
  if (returned) setText(byId("heard"), "The daemon answers again.");
  showWarnings(state);
  run.remember(state);
  showView();
}

function showView() {
  const { state } = seen;
  byId("overview").hidden = runId !== null || state === null;
  byId("run").hidden = runId === null || state === null;
  if (state === null) return;
  const running = count(state.states.running ?? 0);
  document.title = `${runId === null ? `${running} running` : runId} · streamsyn`;
  if (runId === null) overview.show(state);
  else showRun(state.runs.find((one) => one.id === runId));
}

function showRun(found) {
  if (found) run.show(found);
  else {
    request("GET", `/v1/runs/${encodeURIComponent(runId)}`).then(run.show, (error) => {
      if (error instanceof Refused && error.status === 404) location.hash = "#/";
      showError(error.message);
    });
  }
}

function showWarnings({ ready, servers }) {
  const warnings = [];
  if (!ready.ok) warnings.push(["ready", `Not ready: ${ready.why}`]);
  const ejected = servers.filter((server) => server.state === "ejected");
  if (ejected.length) {
    const which = `${counted(ejected.length, "server")} of ${servers.length}`;
    warnings.push(["ejected", `${which} ejected after failures; they are asked again until they answer.`]);
  }
  keyed(byId("warnings"), warnings, ([key]) => key, () => h("p", { class: "banner look" }), (element, [, text]) => setText(element, text));
}

function showGone(why, next) {
  const first = seen.goneSince === 0;
  if (first) seen.goneSince = seen.at || Date.now();
  seen.next = next;
  byId("gone").hidden = false;
  byId("connecting").hidden = true;
  document.body.classList.add("old");
  connected("gone", "not connected");
  setText(byId("about"), "");
  document.title = "No answer · streamsyn";
  setText(byId("gone-what"), why);
  for (const note of document.querySelectorAll(".as-of")) setText(note, seen.at ? `as of ${clock(seen.at / 1000)}` : "");
  if (first) setText(byId("heard"), `${why} ${seen.at ? "What is shown is old." : ""}`);
  byId("warnings").replaceChildren();
  say("");
  showAges();
}

function showAges() {
  if (!seen.goneSince) return;
  const ago = duration((Date.now() - seen.goneSince) / 1000);
  const what = seen.at ? `Last heard from at ${clock(seen.at / 1000)}, ${ago} ago. What is shown below is old.` : `Asked for ${ago}.`;
  setText(byId("gone-since"), what);
  const left = Math.ceil((seen.next - Date.now()) / 1000);
  setText(byId("gone-next"), left > 0 ? `next try in ${left} s` : "trying");
}

function connected(kind, text) {
  byId("light").className = kind;
  setText(byId("connection-text"), text);
}

function wantToken(message) {
  byId("connecting").hidden = true;
  byId("gone").hidden = false;
  connected("gone", "a token is needed");
  setText(byId("gone-what"), message || "This daemon asks for a token.");
  setText(byId("gone-since"), seen.at ? `What is shown below is as of ${clock(seen.at / 1000)}.` : "");
  setText(byId("gone-next"), "");
  seen.goneSince = 0;
  askToken(message, () => connection.again());
}

function forget() {
  token.set("");
  location.reload();
}

/** Shows what was done; a screen reader reads it. */
function say(message) {
  setText(byId("said"), message);
}

function showError(message) {
  byId("error").hidden = !message;
  setText(byId("error-text"), message);
}

function opened(message, id) {
  say(message);
  location.hash = `#/runs/${encodeURIComponent(id)}`;
}

async function act(action, subject) {
  showError("");
  if (action === "seeds") {
    askSeeds(subject, say);
    return;
  }
  try {
    say(await carryOut(action, subject));
  } catch (error) {
    showError(`${subject.id ?? subject.url}: ${error.message}`);
  }
}

/** Asks the daemon for what a button says; returns what to tell. */
async function carryOut(action, subject) {
  if (action === "add-server") {
    update("servers", "url", await request("POST", "/v1/servers", { json: { url: subject.url } }));
    return `${subject.url} is used again.`;
  }
  if (action === "drain-server") {
    update("servers", "url", await request("POST", `/v1/servers/${encodeURIComponent(subject.name)}/drain`));
    return `${subject.url} gets no new requests.`;
  }
  const sent = action === "retry" ? { json: {} } : {};
  update("runs", "id", await request("POST", `/v1/runs/${encodeURIComponent(subject.id)}/${action}`, sent));
  return `${DONE[action]} ${subject.id}.`;
}

/** Shows what an action has made of a run or a server, without waiting for the next state. */
function update(part, key, changed) {
  seen.state[part] = seen.state[part].map((one) => (one[key] === changed[key] ? changed : one));
  showView();
}

function route() {
  const [, id] = location.hash.match(/^#\/runs\/(.+)$/) ?? [];
  const wanted = id === undefined ? null : decoded(id);
  const moved = wanted !== runId;
  runId = wanted;
  if (moved) run.open(runId);
  showView();
  if (moved && seen.state) (runId === null ? byId("main") : byId("run-title")).focus();
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
