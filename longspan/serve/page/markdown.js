// Markdown as elements. Text becomes text nodes and nothing else: no HTML of an answer is ever
// parsed, no image loaded, and links lead to http, https and mailto only.

import { make } from "./format.js";

const MAX_DEPTH = 12;
const MAX_LABEL = 2000;
const PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";
const MARKS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^`\s]*)/;

export function markdown(text) {
  const fragment = document.createDocumentFragment();
  blocks(text.split("\n"), fragment, 0);
  return fragment;
}

// -- blocks -----------------------------------------------------------------------------------

function blocks(lines, parent, depth) {
  let index = 0;
  while (index < lines.length) {
    if (!lines[index].trim()) { index++; continue; }
    const read = depth < MAX_DEPTH && [fence, heading, rule, quote, list, table].find(
      (kind) => kind.begins(lines, index));
    index = (read ? read.take : paragraph)(lines, index, parent, depth);
  }
}

const fence = {
  begins: (lines, at) => FENCE.test(lines[at]),
  take(lines, at, parent) {
    const [, mark, language] = lines[at].match(FENCE);
    let end = at + 1;
    const closes = (line) => line.trim().length >= mark.length
      && line.trim() === mark[0].repeat(line.trim().length);
    while (end < lines.length && !closes(lines[end])) end++;
    parent.append(codeBlock(lines.slice(at + 1, end).join("\n"), language));
    return end + 1;
  },
};

function codeBlock(text, language) {
  const copy = make("button", { type: "button", className: "small copy-code", textContent: "Copy" });
  const head = make("div", { className: "code-head soft" },
    make("span", { textContent: language || "code" }), copy);
  const code = make("pre", { tabIndex: 0 }, make("code", { textContent: text }));
  return make("div", { className: "code" }, head, code);
}

const heading = {
  begins: (lines, at) => /^ {0,3}#{1,6}( |$)/.test(lines[at]),
  take(lines, at, parent, depth) {
    const text = lines[at].trim();
    const level = text.match(/^#+/)[0].length;
    const element = make("div", { className: `heading h${level}`, role: "heading" });
    element.ariaLevel = String(Math.min(6, level + 1));
    inline(text.slice(level).trim().replace(/ #+$/, ""), element, depth);
    parent.append(element);
    return at + 1;
  },
};

const rule = {
  begins(lines, at) {
    const text = lines[at].replace(/\s/g, "");
    return text.length > 2 && "-*_".includes(text[0]) && text === text[0].repeat(text.length);
  },
  take(lines, at, parent) {
    parent.append(make("hr"));
    return at + 1;
  },
};

const quote = {
  begins: (lines, at) => /^ {0,3}>/.test(lines[at]),
  take(lines, at, parent, depth) {
    let end = at;
    while (end < lines.length && quote.begins(lines, end)) end++;
    const element = make("blockquote");
    blocks(lines.slice(at, end).map((line) => line.replace(/^ {0,3}> ?/, "")), element, depth + 1);
    parent.append(element);
    return end;
  },
};

const list = {
  begins: (lines, at) => ITEM.test(lines[at]) && !rule.begins(lines, at),
  take(lines, at, parent, depth) {
    const [, indent, mark] = lines[at].match(ITEM);
    const isOrdered = /\d/.test(mark);
    const element = make(isOrdered ? "ol" : "ul");
    if (isOrdered) element.start = parseInt(mark, 10);
    let index = at;
    while (index < lines.length && list.begins(lines, index)) {
      const [whole, own, sign] = lines[index].match(ITEM);
      if (own.length < indent.length || /\d/.test(sign) !== isOrdered) break;
      const inner = [lines[index].slice(whole.length)];
      const width = own.length + sign.length + 1;
      index++;
      while (index < lines.length && belongs(lines, index, own.length)) {
        const space = lines[index].match(/^ */)[0].length;
        inner.push(lines[index].slice(Math.min(space, width)));
        index++;
      }
      const item = make("li");
      blocks(inner, item, depth + 1);
      element.append(item);
      while (index < lines.length && !lines[index].trim()) index++;
    }
    parent.append(element);
    return index;
  },
};

// Whether a line goes on with an item that is indented so: it is deeper, or no line of its own.
function belongs(lines, at, indent) {
  const space = lines[at].match(/^ */)[0].length;
  if (!lines[at].trim()) {
    let next = at + 1;
    while (next < lines.length && !lines[next].trim()) next++;
    return next < lines.length && lines[next].match(/^ */)[0].length > indent;
  }
  return space > indent || !(starts(lines, at) || !lines[at - 1].trim());
}

const starts = (lines, at) => [fence, heading, rule, quote, list].some(
  (kind) => kind.begins(lines, at));

const cells = (line) => {
  const found = [""];
  const text = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") found[found.length - 1] += text[++i];
    else if (text[i] === "|") found.push("");
    else found[found.length - 1] += text[i];
  }
  return found.map((cell) => cell.trim());
};

const table = {
  begins: (lines, at) => lines[at].includes("|") && at + 1 < lines.length
    && lines[at + 1].includes("-") && cells(lines[at + 1]).every((cell) => /^:?-+:?$/.test(cell))
    && cells(lines[at]).length === cells(lines[at + 1]).length,
  take(lines, at, parent, depth) {
    const sides = cells(lines[at + 1]).map((cell) => cell.endsWith(":")
      ? cell.startsWith(":") ? "center" : "right" : "left");
    const row = (line, tag) => make("tr", {}, ...cells(line).slice(0, sides.length).map(
      (text, column) => {
        const cell = make(tag, tag === "th" ? { scope: "col" } : {});
        cell.style.textAlign = sides[column];
        inline(text, cell, depth);
        return cell;
      }));
    const body = make("tbody");
    let end = at + 2;
    while (end < lines.length && lines[end].includes("|")) body.append(row(lines[end++], "td"));
    const element = make("table", {}, make("thead", {}, row(lines[at], "th")), body);
    parent.append(make("div", { className: "table", tabIndex: 0, role: "group",
      ariaLabel: "Table" }, element));
    return end;
  },
};

function paragraph(lines, at, parent, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim()
    && (depth >= MAX_DEPTH || !(starts(lines, end) || table.begins(lines, end)))) end++;
  const element = make("p");
  inline(lines.slice(at, end).join("\n").trim(), element, depth);
  parent.append(element);
  return end;
}

// -- inside a line ----------------------------------------------------------------------------

function inline(text, parent, depth) {
  let plain = "", at = 0;
  const dead = new Set(); // marks that nothing closes from here on
  const put = (node, next) => {
    if (plain) parent.append(plain);
    plain = "";
    parent.append(node);
    at = next;
  };
  while (at < text.length) {
    const found = depth < MAX_DEPTH && special(text, at, dead, depth);
    if (found) put(found.node, found.next);
    else if (text[at] === "\\" && PUNCTUATION.includes(text[at + 1] ?? " ")) {
      plain += text[at + 1];
      at += 2;
    } else plain += text[at++];
  }
  if (plain) parent.append(plain);
}

function special(text, at, dead, depth) {
  const c = text[at];
  if (c === "`") return codeSpan(text, at, dead);
  if (c === "[" || (c === "!" && text[at + 1] === "[")) return namedLink(text, at, depth);
  if ("*_~".includes(c)) return emphasis(text, at, dead, depth);
  if (c === "<" || c === "h") return bareLink(text, at);
  return null;
}

function codeSpan(text, at, dead) {
  let size = 1;
  while (text[at + size] === "`") size++;
  const mark = "`".repeat(size);
  let end = dead.has(mark) ? -1 : text.indexOf(mark, at + size);
  while (end > 0 && text[end + size] === "`") {
    let next = end + size;
    while (text[next] === "`") next++;
    end = text.indexOf(mark, next);
  }
  if (end < 0) {
    dead.add(mark);
    return { node: document.createTextNode(mark), next: at + size };
  }
  const code = text.slice(at + size, end);
  return { node: make("code", { textContent: code.trim() || code }), next: end + size };
}

const isWord = (c) => c !== undefined && /[\p{L}\p{N}]/u.test(c);

function emphasis(text, at, dead, depth) {
  const mark = MARKS[text.slice(at, at + 2)] ? text.slice(at, at + 2) : text[at];
  const size = mark.length;
  const opens = MARKS[mark] && text[at + size]?.trim() && !dead.has(mark)
    && !(mark[0] === "_" && isWord(text[at - 1]));
  if (!opens) return skip(text, at, size);
  for (let end = text.indexOf(mark, at + size); end > 0; end = text.indexOf(mark, end + 1)) {
    if (size === 1 && text[end + 1] === mark) { end++; continue; }
    if (end === at + size || !text[end - 1].trim() || text[end - 1] === "\\") continue;
    if (mark[0] === "_" && isWord(text[end + size])) continue;
    const node = make(MARKS[mark]);
    inline(text.slice(at + size, end), node, depth + 1);
    return { node, next: end + size };
  }
  dead.add(mark);
  return skip(text, at, size);
}

const skip = (text, at, size) => ({ node: document.createTextNode(text.slice(at, at + size)),
  next: at + size });

function namedLink(text, at, depth) {
  const start = text[at] === "!" ? at + 2 : at + 1;
  const middle = text.indexOf("](", start);
  if (middle < 0 || middle - start > MAX_LABEL) return null;
  const label = text.slice(start, middle);
  const end = text.indexOf(")", middle);
  if (end < 0 || label.includes("[")) return null;
  const [target] = text.slice(middle + 2, end).trim().split(/\s/);
  const node = link(target);
  if (!node) return null;
  inline(label || target, node, depth + 1);
  return { node, next: end + 1 };
}

function bareLink(text, at) {
  const start = text[at] === "<" ? at + 1 : at;
  if (!/^https?:\/\//.test(text.slice(start, start + 8)) || isWord(text[at - 1])) return null;
  let end = start;
  while (end < text.length && !/[\s<>"'`|]/.test(text[end])) end++;
  if (text[at] === "<" && text[end] !== ">") return null;
  while (text[at] !== "<" && ".,;:!?)*_".includes(text[end - 1])) end--;
  const node = link(text.slice(start, end));
  if (!node) return null;
  node.append(text.slice(start, end));
  return { node, next: text[at] === "<" ? end + 1 : end };
}

function link(target) {
  let url;
  try { url = new URL(target); } catch { return null; }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return make("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" });
}
