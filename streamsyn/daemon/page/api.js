// Requests to the daemon, and its stream of states.

const TOKEN = "streamsyn.token";
const SILENT_MS = 6000; // a state comes every second; so long without one means that the daemon is gone
const WAITS_S = [1, 2, 4, 8, 15];
const MAX_ROWS = 16_000_000; // characters

export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (value) => (value ? sessionStorage.setItem(TOKEN, value) : sessionStorage.removeItem(TOKEN)),
};

/** An answer of the daemon that is an error: its status, and its explanation as the message. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The daemon did not answer. */
export class Gone extends Error {}

async function ask(path, { method = "GET", headers = {}, body, signal } = {}) {
  const given = token.get();
  let response;
  try {
    response = await fetch(path, {
      method,
      body,
      signal,
      headers: { ...headers, ...(given ? { Authorization: `Bearer ${given}` } : {}) },
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Gone("The daemon does not answer.");
  }
  if (!response.ok) throw new Refused(response.status, await explanation(response));
  return response;
}

async function explanation(response) {
  const text = (await response.text().catch(() => "")).slice(0, 4000);
  try {
    const problem = JSON.parse(text);
    return String(problem.detail || problem.error?.message || problem.title || text);
  } catch {
    return text || `HTTP ${response.status}`;
  }
}

/** Asks for JSON and returns it; null if the answer has no body. `json` is sent as JSON. */
export async function request(method, path, { json, body, headers = {}, signal } = {}) {
  const sent = json === undefined ? body : JSON.stringify(json);
  const type = json === undefined ? {} : { "Content-Type": "application/json" };
  const response = await ask(path, { method, body: sent, headers: { ...type, ...headers }, signal });
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

/** Returns the rows of an NDJSON answer: those within the first 16 million characters. */
export async function rows(path, signal) {
  const response = await ask(path, { headers: { Accept: "application/x-ndjson" }, signal });
  const found = [];
  for await (const line of lines(response.body, MAX_ROWS)) if (line) found.push(JSON.parse(line));
  return found;
}

/** Yields the lines of a stream; stops within the line that passes `max` characters. */
async function* lines(stream, max = Infinity) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = [];
  let read = 0;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      read += value.length;
      if (read > max) return;
      const parts = value.split("\n");
      for (const part of parts.slice(0, -1)) {
        yield rest.join("") + part;
        rest = [];
      }
      rest.push(parts.at(-1));
    }
    const last = rest.join("");
    if (last) yield last;
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** Yields the data of the events of a stream of server-sent events. */
async function* events(stream) {
  let data = [];
  for await (const line of lines(stream)) {
    if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
    else if (line === "" && data.length) {
      yield JSON.parse(data.join("\n"));
      data = [];
    }
  }
}

/**
 * Follows the daemon's states for as long as the page is open and visible; takes the stream up again when it breaks.
 *
 * `onState(state)` gets each state; `onGone(why, next)` is called when the daemon is gone, with the time in
 * milliseconds at which it is asked again; `onToken(message)` when it wants a token, after which nothing is asked
 * until `again()` is called.
 */
export function follow({ onState, onGone, onToken }) {
  let stop = new AbortController();
  let failures = 0;
  let timer = 0;
  let turn = 0;

  async function connect() {
    clearTimeout(timer);
    stop.abort();
    stop = new AbortController();
    const mine = ++turn;
    const { signal } = stop;
    let silence = 0;
    const listen = () => {
      clearTimeout(silence);
      silence = setTimeout(() => stop.abort(), SILENT_MS);
    };
    try {
      listen();
      const response = await ask("/v1/events", { headers: { Accept: "text/event-stream" }, signal });
      for await (const state of events(response.body)) {
        listen();
        failures = 0;
        if (mine === turn) onState(state);
      }
      throw new Gone("The daemon ended the connection.");
    } catch (error) {
      if (mine !== turn) return; // a newer connection has replaced this one
      failed(error);
    } finally {
      clearTimeout(silence);
    }
  }

  function failed(error) {
    if (error instanceof Refused && error.status === 401) {
      onToken(token.get() ? "The daemon refused this token." : "");
      return;
    }
    const wait = WAITS_S[Math.min(failures, WAITS_S.length - 1)] * 1000 * (0.8 + 0.4 * Math.random());
    failures += 1;
    timer = setTimeout(connect, wait);
    const why = error instanceof Refused ? `The daemon answered: ${error.message}` : "The daemon does not answer.";
    onGone(why, Date.now() + wait);
  }

  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "visible") connect();
    else {
      turn += 1; // a page that nobody sees asks nothing
      clearTimeout(timer);
      stop.abort();
    }
  });
  addEventListener("online", connect);
  connect();
  return { again: connect };
}
