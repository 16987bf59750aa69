// The server, by its HTTP routes.

import { seconds } from "./format.js";

const HEALTH_TIMEOUT_MS = 4000;

// Not relative: the address may hold a user and a key, which fetch refuses.
const at = (path) => location.origin + location.pathname.replace(/[^/]*$/, "") + path;

export async function post(path, body, signal) {
  const reply = await fetch(at(path), { method: "POST", signal, body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" } });
  if (!reply.ok) throw new Error(await explain(reply));
  return reply;
}

async function explain(reply) {
  let text = `The server answered ${reply.status}.`;
  try { text = (await reply.json()).error.message; } catch { /* not our error shape */ }
  const wait = reply.headers.get("Retry-After");
  return wait ? `${text} Try again in ${seconds(1000 * wait)}.` : text;
}

export async function tokenize(prompt) {
  return (await post("tokenize", { prompt, return_tokens: false })).json();
}

// Where in the files the words of an answer stand.
export async function sourcesOf(files, answer, question) {
  const documents = files.map(({ name, text }) => ({ name, text }));
  return (await (await post("sources", { documents, answer, question })).json()).sources;
}

// "ready", "loading", ... as the server says it, or "unreachable".
export async function health() {
  try {
    const signal = AbortSignal.timeout(HEALTH_TIMEOUT_MS);
    return (await (await fetch(at("health"), { signal, cache: "no-store" })).json()).status;
  } catch { return "unreachable"; }
}

export async function model() {
  return (await (await fetch(at("v1/models"))).json()).data[0];
}

export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}
