// The page: what it knows, and what happens when.

import { events, health, model, post, sourcesOf, tokenize } from "./api.js";
import { ABOUT, ABOUT_NANO, example } from "./example.js";
import { asPrompt, chosen, dropped } from "./files.js";
import { $, count, make, number, seconds } from "./format.js";
import * as past from "./history.js";
import { Reading } from "./reading.js";
import { AnswerTurn, copy, factsOf, questionTurn } from "./turns.js";

const READY_MS = 5000, WAITING_MS = 1500;
const FIELDS = ["system", "temperature", "top_p", "top_k", "seed", "max"];
const SAMPLING = ["temperature", "top_p", "top_k", "seed"];
const DEFAULT_MAX_TOKENS = 512;
const STATES = { unreachable: "The server cannot be reached; start it again, and this page goes on.",
  loading: "The server is still loading its model.",
  draining: "The server is shutting down.", dead: "The server has failed; see what it printed." };

// `messages`: questions with their files, and answers. `draft`: the files of the next question.
const page = { id: "", messages: [], draft: noDraft(), editing: null, abort: null,
  state: "connecting", model: null };

// Tokens of what stands before the next question; the server holds them in its prefix cache.
const used = () => page.messages[(page.editing ?? page.messages.length) - 1]?.used ?? 0;

function noDraft() {
  return { files: [], leftOut: [], tokens: 0, expectedMs: 0, problem: "", version: 0 };
}

// -- state of the server ----------------------------------------------------------------------

let watchTimer = 0;

async function watch() {
  clearTimeout(watchTimer);
  const before = page.state;
  page.state = await health();
  $("state").textContent = page.state;
  $("state").className = page.state === "ready" ? "ready" : STATES[page.state] ? "dead" : "";
  if (page.state === "ready" && (before !== "ready" || !page.model)) await loadModel();
  if (page.state !== before) showNotice("");
  showAsk();
  watchTimer = setTimeout(watch, page.state === "ready" ? READY_MS : WAITING_MS);
}

async function loadModel() {
  try { page.model = await model(); } catch { return; } // tried again
  $("model").textContent = `${page.model.id}, up to ${number(page.model.max_model_len)} tokens`;
  $("about").textContent = page.model.id === "nano" ? `${ABOUT_NANO} ${ABOUT}` : ABOUT;
  if (page.draft.files.length && !page.draft.tokens) countFiles();
  showLive();
}

function showNotice(text) {
  $("notice").textContent = text || STATES[page.state] || "";
  $("notice").hidden = !$("notice").textContent;
}

// -- files of the next question ---------------------------------------------------------------

async function take(found) {
  if (page.abort) return;
  const { files, leftOut } = await found;
  const taken = new Set([...page.messages.flatMap((message) => message.files ?? []),
    ...page.draft.files].map((file) => file.name));
  for (const file of files) {
    for (let copyNumber = 2, { name } = file; taken.has(file.name); copyNumber++)
      file.name = `${name} (${copyNumber})`;
    taken.add(file.name);
  }
  page.draft.files.push(...files);
  page.draft.leftOut.push(...leftOut);
  if (!files.length && leftOut.length === 1)
    showNotice(`${leftOut[0].name} is not taken: ${leftOut[0].reason}.`);
  else if (!files.length && !leftOut.length) showNotice("There is no file in it.");
  else showNotice("");
  showFiles();
  countFiles();
  $("question").focus();
}

// Each file, and all of them together as the model will read them.
async function countFiles() {
  const { draft } = page;
  const version = ++draft.version;
  draft.tokens = 0;
  draft.problem = "";
  showFiles();
  if (!draft.files.length) { keepDraft(); showLive(); return; }
  try {
    for (const file of draft.files) {
      file.tokens ??= (await tokenize(file.text)).count;
      if (version !== draft.version || draft !== page.draft) return;
      showFiles();
    }
    const counted = await tokenize(asPrompt(draft.files));
    if (version !== draft.version || draft !== page.draft) return;
    draft.tokens = counted.count;
    draft.expectedMs = counted.predicted_ttft_ms;
    if (used() + counted.count >= counted.max_model_len) draft.problem =
      `too long: the limit is ${number(counted.max_model_len)} tokens; remove some`;
  } catch (error) {
    draft.problem = error.message;
    watch();
  }
  if (version !== draft.version || draft !== page.draft) return;
  showFiles();
  keepDraft();
  showLive();
}

function showFiles() {
  const { files, leftOut, tokens, expectedMs, problem } = page.draft;
  $("files").hidden = !files.length && !leftOut.length;
  $("count").textContent = !files.length ? "" : `${count(files.length, "file")}, `
    + (tokens ? `${number(tokens)} tokens` : problem ? "not counted" : "counting tokens");
  $("expected").className = problem ? "error" : "";
  $("expected").textContent = problem || (tokens && expectedMs
    ? `first answer in about ${seconds(expectedMs)}` : "");
  $("chips").replaceChildren(...files.map((file, index) => make("li", {},
    make("span", { className: "name", textContent: file.name }),
    make("span", { className: "soft", textContent: file.tokens === undefined ? ""
      : count(file.tokens, "token") }),
    removeButton(file, index))));
  $("left-out").hidden = !leftOut.length;
  $("left-out").firstElementChild.textContent = `${count(leftOut.length, "entry")
    .replace("entrys", "entries")} left out`;
  $("left-out").lastElementChild.replaceChildren(...leftOut.map(({ name, reason }) =>
    make("li", { textContent: `${name}: ${reason}` })));
  $("question").placeholder = files.length ? "Ask about the files" : "Ask something";
}

function removeButton(file, index) {
  const button = make("button", { type: "button", className: "small", textContent: "×",
    ariaLabel: `Remove ${file.name}`, title: "Remove" });
  button.addEventListener("click", () => {
    page.draft.files.splice(index, 1);
    countFiles();
    $("question").focus();
  });
  return button;
}

// -- the question -----------------------------------------------------------------------------

let countTimer = 0;

function showAsk() {
  $("ask").disabled = !$("question").value.trim() || page.state !== "ready"
    || Boolean(page.draft.problem);
}

function showLive() {
  showAsk();
  clearTimeout(countTimer);
  countTimer = setTimeout(countQuestion, 300);
}

// The files are counted once; only the question is counted again.
async function countQuestion() {
  const question = $("question").value.trim();
  if (!page.model || page.abort) return;
  if (!question && !page.draft.tokens && !used()) { $("live").textContent = ""; return; }
  try {
    const counted = question ? await tokenize(question) : { count: 0, predicted_ttft_ms: 0 };
    if (page.abort) return;
    const total = used() + page.draft.tokens + counted.count;
    const wait = page.draft.expectedMs + (used() ? 0 : counted.predicted_ttft_ms);
    $("live").textContent = `${number(total)} of ${number(page.model.max_model_len)} tokens`
      + (wait ? `, first token in about ${seconds(wait)}` : "")
      + (used() ? ` (${number(used())} are in the cache)` : "");
    toEnd(false);
  } catch { $("live").textContent = ""; }
}

function grow() {
  const area = $("question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function toEnd(always) {
  const box = $("scroll");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 120)
    box.scrollTop = box.scrollHeight;
}

// -- the answer -------------------------------------------------------------------------------

const given = (id) => $(id).value.trim() === "" ? undefined : Number($(id).value);

function requestBody(messages) {
  const sent = messages.map(({ role, content, files }) => ({ role,
    content: files?.length ? `${asPrompt(files)}\n\n${content}` : content }));
  const system = $("system").value.trim();
  if (system) sent.unshift({ role: "system", content: system });
  return { messages: sent, stream: true, return_progress: true,
    stream_options: { include_usage: true }, max_tokens: given("max") ?? DEFAULT_MAX_TOKENS,
    ...Object.fromEntries(SAMPLING.map((name) => [name, given(name)])
      .filter(([, value]) => value !== undefined)) };
}

function submit() {
  const content = $("question").value.trim();
  if (!content || page.abort || $("ask").disabled) return;
  if (page.editing !== null) cut(page.editing);
  stopEditing();
  const { files } = page.draft;
  page.draft = noDraft();
  $("question").value = "";
  grow();
  showFiles();
  page.messages.push({ role: "user", content, files });
  $("log").append(questionTurn(page.messages.at(-1)));
  answer();
}

// Answer the last question.
async function answer() {
  page.abort = new AbortController();
  const run = { started: performance.now(), expectedMs: null, firstMs: null, text: "",
    reason: "", problem: "", usage: null, timings: null };
  setBusy(true);
  keep();
  const turn = new AnswerTurn();
  $("log").append(turn.element);
  toEnd(true);
  const reading = new Reading(turn.element);
  try {
    const reply = await post("v1/chat/completions", requestBody(page.messages), page.abort.signal);
    for await (const event of events(reply)) receive(event, run, turn, reading);
    if (!run.reason) throw new Error("The answer ended early.");
  } catch (error) {
    run.reason = error.name === "AbortError" ? "stopped" : "failed";
    if (run.reason === "failed") {
      run.problem = error instanceof TypeError ? "The connection to the server broke."
        : error.message;
      turn.error(run.problem);
      watch();
    }
  }
  reading.close();
  finish(run, turn);
}

function receive(event, run, turn, reading) {
  if (event.error) throw new Error(event.error.message);
  if (event.prompt_progress) {
    const isFresh = event.prompt_progress.processed <= event.prompt_progress.cache;
    if (isFresh) run.expectedMs = event.predicted_ttft_ms;
    run.progress = event.prompt_progress;
    reading.update(event.prompt_progress, event.predicted_ttft_ms);
  }
  if (event.usage) run.usage = event.usage;
  if (event.timings) run.timings = event.timings;
  const choice = event.choices?.[0];
  if (!choice) return;
  if (choice.delta.content) {
    if (run.firstMs === null) {
      run.firstMs = performance.now() - run.started;
      reading.close();
    }
    run.text += choice.delta.content;
    turn.push(choice.delta.content);
    toEnd(false);
  }
  if (choice.finish_reason) run.reason = choice.finish_reason;
}

// What came of an answer stays; without any, the question goes back to where it was typed.
function finish(run, turn) {
  if (run.text) {
    const facts = factsOf(run);
    turn.finish(facts);
    const used = run.usage ? run.usage.prompt_tokens + run.usage.completion_tokens
      : run.progress?.total ?? 0; // a stopped answer tells no usage
    page.messages.push({ role: "assistant", content: run.text, facts, used });
    showSources(turn, page.messages.length - 1, page.id);
  } else takeBack(run.problem || (run.reason === "stopped"
    ? "Stopped before the answer began." : "The model answered nothing."));
  page.abort = null;
  setBusy(false);
  keep();
  grow();
  showLive();
  toEnd(true);
  $("question").focus();
}

// Found by comparing words, since models name the wrong file.
async function showSources(turn, index, id) {
  const { messages } = page;
  const files = messages.slice(0, index).flatMap((message) => message.files ?? []);
  if (!files.length) return;
  let found;
  try { found = await sourcesOf(files, messages[index].content, messages[index - 1].content); }
  catch { return; } // the answer stands without them
  if (page.id !== id || page.messages !== messages || !turn.element.isConnected) return;
  messages[index].sources = found;
  turn.sources(found);
  keep();
  toEnd(false);
}

function takeBack(why) {
  $("log").lastElementChild.remove();
  const { content, files } = page.messages.at(-1);
  cut(page.messages.length - 1);
  page.draft = { ...noDraft(), files: [...files, ...page.draft.files] };
  $("question").value = [content, $("question").value].filter(Boolean).join("\n");
  countFiles();
  showNotice(why);
}

function setBusy(isBusy) {
  $("ask").hidden = isBusy;
  $("stop").hidden = !isBusy;
  for (const id of ["new", "history", "attach", "example"]) $(id).disabled = isBusy;
  for (const button of document.querySelectorAll(".edit, .again")) button.disabled = isBusy;
  $("welcome").hidden = page.messages.length > 0;
  $("live").textContent = isBusy ? "Esc stops" : "";
}

// -- editing and asking again -----------------------------------------------------------------

function cut(index) {
  page.messages.length = index;
  while ($("log").children.length > index) $("log").lastElementChild.remove();
}

function edit(index) {
  const { content, files } = page.messages[index];
  page.editing = index;
  page.draft = { ...noDraft(), files: [...files] };
  $("question").value = content;
  $("editing").hidden = false;
  $("editing").firstElementChild.textContent = index + 2 < page.messages.length
    ? "Editing: what follows this question is replaced." : "Editing this question.";
  grow();
  countFiles();
  $("question").focus();
}

function stopEditing() {
  page.editing = null;
  $("editing").hidden = true;
}

function act(event) {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.classList.contains("copy-code")) {
    copy(button.closest(".code").querySelector("code").textContent, button);
    return;
  }
  const index = [...$("log").children].indexOf(button.closest(".turn"));
  if (button.classList.contains("copy")) copy(page.messages[index].content, button);
  else if (button.classList.contains("edit")) edit(index);
  else if (button.classList.contains("again") && page.state === "ready") {
    stopEditing();
    cut(index);
    answer();
  }
}

// -- conversations ----------------------------------------------------------------------------

async function keep() {
  if (!page.messages.length && !page.draft.files.length) return;
  const title = page.messages[0]?.content || page.draft.files[0]?.name || "Chat";
  try {
    await past.save({ id: page.id, at: Date.now(), title, messages: page.messages,
      draft: page.draft.files });
  } catch { showNotice("This browser keeps no history: it allows no storage."); }
}

const keepDraft = () => { if (page.editing === null && !page.abort) keep(); };

function begin(conversation) {
  stopEditing();
  Object.assign(page, { id: conversation?.id ?? crypto.randomUUID?.() ?? String(Math.random()),
    messages: conversation?.messages ?? [],
    draft: { ...noDraft(), files: conversation?.draft ?? [] } });
  past.current.set(page.id);
  if (page.messages.at(-1)?.role === "user") { // cut off by a reload, in the middle of its answer
    const { content, files } = page.messages.pop();
    page.draft.files = files;
    $("question").value = content;
  }
  $("log").replaceChildren(...page.messages.map(shown));
  setBusy(false);
  showNotice("");
  grow();
  countFiles();
  toEnd(true);
  $("question").focus();
}

function shown(message) {
  if (message.role === "user") return questionTurn(message);
  const turn = new AnswerTurn();
  turn.text = message.content;
  turn.finish(message.facts);
  turn.sources(message.sources);
  return turn.element;
}

async function showPast() {
  const list = $("past").querySelector("ul");
  let found = [];
  try { found = await past.all(); }
  catch { $("past-note").textContent = "This browser allows no storage."; }
  $("forget").hidden = !found.length;
  list.replaceChildren(...found.map((conversation) => {
    const open = make("button", { type: "button", className: "open" },
      make("span", { className: "name", textContent: conversation.title.slice(0, 120) }),
      make("span", { className: "soft", textContent: new Date(conversation.at).toLocaleString()
        + (conversation.id === page.id ? ", this one" : "") }));
    const remove = make("button", { type: "button", className: "small", textContent: "Delete",
      ariaLabel: `Delete ${conversation.title.slice(0, 120)}` });
    open.addEventListener("click", () => { $("past").close(); begin(conversation); });
    remove.addEventListener("click", async () => {
      await past.remove(conversation.id);
      if (conversation.id === page.id) begin(null);
      showPast();
    });
    return make("li", {}, open, remove);
  }));
  if (!found.length) list.append(make("li", { className: "soft", textContent: "Nothing yet." }));
  if (!$("past").open) $("past").showModal();
}

async function start() {
  const options = past.options.get();
  for (const id of FIELDS) $(id).value = options[id] ?? "";
  let conversation = null;
  try { if (past.current.get()) conversation = await past.load(past.current.get()); }
  catch { /* said when something is to be kept */ }
  begin(conversation);
  watch();
}

function tryExample() {
  const { file, question } = example();
  page.draft = { ...noDraft(), files: [{ ...file, size: file.text.length }] };
  $("question").value = question;
  showAsk();
  submit();
}

// -- events -----------------------------------------------------------------------------------

const on = (id, kind, what) => $(id).addEventListener(kind, what);

on("form", "submit", (event) => { event.preventDefault(); submit(); });
on("stop", "click", () => page.abort?.abort());
on("question", "input", () => { grow(); showLive(); });
on("question", "keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (page.abort) page.abort.abort();
  else if (page.editing !== null) $("cancel-edit").click();
});
on("log", "click", act);
on("new", "click", () => { $("question").value = ""; begin(null); });
on("history", "click", showPast);
on("close-past", "click", () => $("past").close());
on("forget", "click", async () => { await past.clear(); begin(null); showPast(); });
on("example", "click", tryExample);
on("cancel-edit", "click", () => {
  stopEditing();
  page.draft = noDraft();
  $("question").value = "";
  grow();
  countFiles();
  $("question").focus();
});
on("remove-all", "click", () => {
  page.draft = noDraft();
  countFiles();
  $("question").focus();
});
for (const [button, input] of [["choose", "file"], ["attach", "file"], ["choose-folder", "folder"]])
  on(button, "click", () => $(input).click());
for (const id of ["file", "folder"])
  on(id, "change", () => { take(chosen([...$(id).files])); $(id).value = ""; });
for (const id of FIELDS) on(id, "change", () => past.options.set(
  Object.fromEntries(FIELDS.map((name) => [name, $(name).value]))));
for (const kind of ["dragover", "dragenter"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
for (const kind of ["dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    if (kind === "drop" || !event.relatedTarget) document.body.classList.remove("over");
  });
document.addEventListener("drop", (event) => take(dropped(event.dataTransfer)));
document.addEventListener("visibilitychange", () => { if (!document.hidden) watch(); });
start();
