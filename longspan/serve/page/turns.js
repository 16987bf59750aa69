// Questions and answers as they are shown.

import { count, make, number, seconds } from "./format.js";
import { markdown } from "./markdown.js";

const MIN_REDRAW_MS = 60;

const button = (name, text) => make("button",
  { type: "button", className: `small ${name}`, textContent: text });

export function questionTurn(message) {
  const turn = make("div", { className: "turn user" },
    make("div", { className: "who", textContent: "You" }));
  if (message.files.length) turn.append(fileNames(message.files));
  turn.append(make("div", { className: "text", textContent: message.content }),
    make("div", { className: "actions" }, button("edit", "Edit"), button("copy", "Copy")));
  return turn;
}

function fileNames(files) {
  const names = files.map((file) => file.name);
  if (names.length === 1)
    return make("div", { className: "attached soft", textContent: `with ${names[0]}` });
  return make("details", { className: "attached soft" },
    make("summary", { textContent: `with ${count(names.length, "file")}` }),
    make("ul", {}, ...names.map((name) => make("li", { textContent: name }))));
}

export class AnswerTurn {
  constructor() {
    this.body = make("div", { className: "text" });
    this.element = make("div", { className: "turn assistant" },
      make("div", { className: "who", textContent: "Answer" }), this.body);
    this.element.ariaBusy = "true";
    this.text = "";
    this.timer = 0;
    this.takesMs = 0;
  }

  // Drawn at once, and then so often that drawing takes a tenth of the time.
  push(text) {
    this.text += text;
    this.timer ||= setTimeout(() => this.draw(), Math.max(MIN_REDRAW_MS, 9 * this.takesMs));
    if (!this.body.hasChildNodes()) this.draw();
  }

  draw() {
    clearTimeout(this.timer);
    this.timer = 0;
    const start = performance.now();
    this.body.replaceChildren(markdown(this.text));
    this.takesMs = performance.now() - start;
  }

  // Where the answer's words stand in the files; null: nobody looked.
  sources(found) {
    if (!found) return;
    this.body.after(make("div", { className: "sources soft" }, ...(found.length
      ? found.map(passage) : [make("span", { textContent: "No file says it in these words." })])));
  }

  error(text) {
    this.element.append(make("div", { className: "error", role: "alert", textContent: text }));
  }

  finish(facts) {
    if (this.text) this.draw();
    this.element.ariaBusy = "false";
    if (facts.length) this.element.append(make("div", { className: "facts" },
      ...facts.map(([text, kind]) => make("span", { textContent: text, className: kind ?? "" }))));
    this.element.append(make("div", { className: "actions" },
      button("again", "Ask again"), ...(this.text ? [button("copy", "Copy")] : [])));
  }
}

function passage({ name, line, quote, is_asked: isAsked }) {
  return make("details", {},
    make("summary", { textContent: `${isAsked ? "You asked about" : "From"} ${name}, line ${
      number(line)}` }), make("blockquote", { textContent: quote }));
}

// What an answer cost, as [text, kind].
export function factsOf(run) {
  const facts = [];
  if (run.reason === "stopped") facts.push(["stopped"]);
  if (run.reason === "length") facts.push(["cut at the longest answer"]);
  const actual = run.timings?.ttft_ms ?? run.firstMs;
  const expected = run.timings?.predicted_ttft_ms ?? run.expectedMs;
  if (actual !== null) facts.push([`first token ${seconds(actual)}`
    + (expected ? `, predicted ${seconds(expected)}` : "")]);
  const total = run.usage?.prompt_tokens ?? run.progress?.total;
  const cached = run.usage?.prompt_tokens_details.cached_tokens ?? run.progress?.cache ?? 0;
  if (total) facts.push([`${number(total)} prompt tokens`]);
  if (cached) facts.push([`${number(cached)} from the prefix cache`, "hit"]);
  const { host_tokens: host, disk_tokens: disk, load_ms: loadMs } =
    run.usage?.prompt_tokens_details ?? {};
  if (host) facts.push([`${number(host)} from host memory`, "hit"]);
  if (disk) facts.push([`${number(disk)} from disk`, "hit"]);
  if (loadMs) facts.push([`loaded in ${seconds(loadMs)}`, "hit"]);
  if (run.usage) facts.push([`${number(run.usage.completion_tokens)} answer tokens`]);
  if (run.timings?.predicted_per_second)
    facts.push([`${run.timings.predicted_per_second.toFixed(1)} tokens/s`]);
  return facts;
}

export async function copy(text, place) {
  let isDone = true;
  try { await navigator.clipboard.writeText(text); }
  catch { isDone = copyBySelection(text); } // pages without TLS have no clipboard
  const before = place.textContent;
  place.textContent = isDone ? "Copied" : "Not allowed";
  setTimeout(() => { place.textContent = before; }, 1500);
}

function copyBySelection(text) {
  const area = make("textarea", { value: text, className: "hidden" });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return isDone;
}
