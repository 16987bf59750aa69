// Which files a folder's .gitignore leaves out, as git does.

function segment(glob) {
  let out = "";
  for (let i = 0; i < glob.length; i++) {
    const c = glob[i];
    const end = c === "[" ? glob.indexOf("]", i + 2) : -1;
    if (c === "*") out += "[^/]*";
    else if (c === "?") out += "[^/]";
    else if (end > 0) {
      out += `[${glob.slice(i + 1, end).replace(/^!/, "^").replace(/\\/g, "\\\\")}]`;
      i = end;
    } else {
      if (c === "\\" && i + 1 < glob.length) i++;
      out += glob[i].replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");
    }
  }
  return out;
}

function rule(line) {
  let glob = line.replace(/\r$/, "").replace(/(^|[^\\])\s+$/, "$1");
  if (!glob || glob.startsWith("#")) return null;
  const keeps = glob.startsWith("!");
  if (keeps) glob = glob.slice(1);
  const foldersOnly = glob.endsWith("/");
  if (foldersOnly) glob = glob.slice(0, -1);
  const anchored = glob.includes("/");
  const parts = glob.replace(/^\//, "").split("/");
  let source = anchored ? "" : "(?:.*/)?";
  parts.forEach((part, index) => {
    const isLast = index === parts.length - 1;
    if (part === "**") source += isLast ? ".+" : "(?:.*/)?";
    else source += segment(part) + (isLast ? "" : "/");
  });
  try { return { keeps, foldersOnly, pattern: new RegExp(`^${source}$`, "s") }; }
  catch { return null; } // brackets that git does not understand either
}

export class IgnoreRules {
  constructor(layers = []) { this.layers = layers; }
  // The rules below a folder ("" or "a/b/") whose .gitignore has this text.
  inside(folder, text) {
    const rules = text.split("\n").map(rule).filter(Boolean);
    return new IgnoreRules([{ folder, rules }, ...this.layers]);
  }
  // The innermost rule that speaks of a path decides, and of one file the last one.
  ignores(path, isFolder) {
    for (const { folder, rules } of this.layers) {
      const name = path.slice(folder.length);
      const found = rules.findLast((one) => (isFolder || !one.foldersOnly)
        && one.pattern.test(name));
      if (found) return !found.keeps;
    }
    return false;
  }
}
