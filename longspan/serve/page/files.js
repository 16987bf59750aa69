// Files and folders that are dropped or chosen, as texts under their names.

import { IgnoreRules } from "./ignore.js";

const MAX_BYTES = 2 ** 26;
const BLOCKS = "p, div, li, tr, h1, h2, h3, h4, pre, br, dt, dd";
const NOT_SHOWN = "script, style, head, nav, svg, template";

// A reason not to take a file, in a few words.
class Refusal extends Error {}

// Call it in the event itself: afterwards the browser forgets what was dropped.
export function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  return gather(entries.length ? entries.map(fromEntry) : [...transfer.files].map(fromFile));
}

export function chosen(files) {
  const roots = new Map();
  for (const file of files) {
    const parts = (file.webkitRelativePath || file.name).split("/");
    let level = roots;
    for (const part of parts.slice(0, -1)) {
      if (!level.has(part)) level.set(part, new Map());
      level = level.get(part);
    }
    level.set(parts.at(-1), file);
  }
  return gather(fromMap(roots));
}

// A node: {name, read} of a file, or {name, list} of a folder.
const fromFile = (file) => ({ name: file.name, read: async () => file });

const fromMap = (map) => [...map].map(([name, value]) => value instanceof Map
  ? { name, list: async () => fromMap(value) } : { name, read: async () => value });

function fromEntry(entry) {
  const promise = (call) => new Promise((resolve, reject) => call(resolve, reject));
  if (!entry.isDirectory)
    return { name: entry.name, read: () => promise((...done) => entry.file(...done)) };
  return { name: entry.name, list: async () => {
    const reader = entry.createReader(), found = [];
    for (;;) { // it gives a hundred at a time
      const some = await promise((...done) => reader.readEntries(...done));
      if (!some.length) return found.map(fromEntry);
      found.push(...some);
    }
  } };
}

async function gather(nodes) {
  const result = { files: [], leftOut: [] };
  for (const node of nodes) {
    if (node.list) await walk(node, `${node.name}/`, new IgnoreRules(), result);
    else await take(node, node.name, result);
  }
  return result;
}

async function walk(folder, path, rules, result) {
  const nodes = (await folder.list()).sort((a, b) => Boolean(a.list) - Boolean(b.list)
    || (a.name < b.name ? -1 : 1));
  const own = nodes.find((node) => node.name === ".gitignore" && node.read);
  if (own) rules = rules.inside(path, await (await own.read()).text());
  for (const node of nodes) {
    const name = path + node.name;
    const shown = node.list ? `${name}/` : name;
    if (node.name === ".git") continue;
    if (node.name.startsWith(".")) result.leftOut.push({ name: shown, reason: "hidden" });
    else if (rules.ignores(name, Boolean(node.list)))
      result.leftOut.push({ name: shown, reason: "ignored by .gitignore" });
    else if (node.list) await walk(node, shown, rules, result);
    else await take(node, name, result);
  }
}

async function take(node, name, result) {
  try {
    const file = await node.read();
    result.files.push({ name, size: file.size, text: await textOf(file) });
  } catch (error) {
    result.leftOut.push({ name, reason: error instanceof Refusal ? error.message
      : "cannot be read" });
  }
}

async function textOf(file) {
  const head = new Uint8Array(await file.slice(0, 8192).arrayBuffer());
  const starts = (...bytes) => bytes.every((byte, index) => head[index] === byte);
  const isWide = starts(0xff, 0xfe) || starts(0xfe, 0xff);
  if (starts(0x25, 0x50, 0x44, 0x46, 0x2d))
    throw new Refusal("PDF: `longspan generate --document` reads it");
  if (/\.docx$/i.test(file.name)) throw new Refusal("Word: `longspan generate --document` reads it");
  if (file.size > MAX_BYTES) throw new Refusal(`larger than ${MAX_BYTES >> 20} MiB`);
  if (!isWide && head.includes(0)) throw new Refusal("binary");
  let text;
  try {
    const encoding = !isWide ? "utf-8" : starts(0xff, 0xfe) ? "utf-16le" : "utf-16be";
    text = new TextDecoder(encoding, { fatal: true }).decode(await file.arrayBuffer());
  } catch { throw new Refusal("not UTF-8"); }
  if (!isWide && text.includes("\0")) throw new Refusal("binary");
  if (/\.(html?|xhtml)$/i.test(file.name)) text = pageText(text);
  text = text.replaceAll("\r\n", "\n").replace(/^\n+/, "").trimEnd();
  if (!text) throw new Refusal("empty");
  return text;
}

function pageText(page) {
  const parsed = new DOMParser().parseFromString(page, "text/html");
  parsed.querySelectorAll(NOT_SHOWN).forEach((node) => node.remove());
  parsed.querySelectorAll(BLOCKS).forEach((node) => node.before("\n"));
  return parsed.documentElement.textContent.replace(/[ \t]+\n/g, "\n").replace(/\n{3,}/g, "\n\n");
}

// What the model reads: each file under its name.
export const asPrompt = (files) => files.map((file) => `===== ${file.name} =====\n${file.text}`)
  .join("\n\n");
