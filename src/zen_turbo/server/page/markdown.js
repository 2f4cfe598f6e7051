// Markdown to nodes. What a model writes is a stranger's text: it becomes text nodes inside elements that are named here, and no other way
// exists. Bounded: nesting has a limit, and every search that fails once is not repeated.

import { copyButton, el } from "./dom.js";

const DEEPEST = 8;
const LONGEST_LABEL = 1000;
const LONGEST_URL = 2000;

// Blocks

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?: +(?=\S)| *$)/;
const QUOTE = /^ {0,3}> ?/;

/** The blocks of a text: {kind, raw, ...}. Equal raw text at equal depth is an equal block, which is what redrawing a stream relies on. */
export function parse(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const start = at;
    const [block, next] = blockAt(lines, at, depth);
    at = next;
    blocks.push({ ...block, raw: lines.slice(start, at).join("\n") });
  }
  return blocks;
}

function blockAt(lines, start, depth) {
  const line = lines[start];
  const fence = line.match(FENCE);
  if (fence) return fenced(lines, start, fence);
  const heading = line.match(HEADING);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: withoutClosingMarks(heading[2] ?? "") }, start + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, start + 1];
  if (depth < DEEPEST) {
    if (QUOTE.test(line)) return quote(lines, start, depth);
    if (ITEM.test(line)) return list(lines, start, depth);
  }
  if (isTable(lines, start)) return table(lines, start);
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end, depth)) end += 1;
  return [{ kind: "paragraph", text: lines.slice(start, end).map((each) => each.trim()).join("\n") }, end];
}

function interrupts(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at)) return true;
  return depth < DEEPEST && (QUOTE.test(line) || /^ {0,3}(?:[-*+]|1[.)]) +\S/.test(line));
}

/** "# Title ##" is titled "Title". */
function withoutClosingMarks(text) {
  let end = text.trimEnd().length;
  const whole = end;
  while (end > 0 && text[end - 1] === "#") end -= 1;
  return end === 0 || (end < whole && text[end - 1] === " ") ? text.slice(0, end).trim() : text.trim();
}

/** A fence that is not closed yet holds all that follows: the stream is in it. */
function fenced(lines, start, [opening, marks, info]) {
  const indent = opening.length - opening.trimStart().length;
  const body = [];
  let at = start + 1;
  for (; at < lines.length; at += 1) {
    const closing = lines[at].trim();
    if (closing.length >= marks.length && closing === marks[0].repeat(closing.length)) break;
    body.push(outdented(lines[at], indent));
  }
  return [{ kind: "code", language: info.trim().split(/\s/)[0].slice(0, 30), text: body.join("\n") }, Math.min(at + 1, lines.length)];
}

/** Columns of white space that a line begins with, and the line with at most that many of them cut off. A tab is four. */
const indentOf = (line) => line.match(/^[ \t]*/)[0].replace(/\t/g, "    ").length;

function outdented(line, columns) {
  let at = 0;
  for (let seen = 0; seen < columns && (line[at] === " " || line[at] === "\t"); at += 1) seen += line[at] === "\t" ? 4 : 1;
  return line.slice(at);
}

function quote(lines, start, depth) {
  let at = start;
  const body = [];
  for (; at < lines.length && QUOTE.test(lines[at]); at += 1) body.push(lines[at].replace(QUOTE, ""));
  return [{ kind: "quote", blocks: parse(body.join("\n"), depth + 1) }, at];
}

function list(lines, start, depth) {
  const first = lines[start].match(ITEM);
  const ordered = /\d/.test(first[2]);
  const kind = first[2].at(-1);
  const items = [];
  let loose = false;
  let at = start;
  while (at < lines.length) {
    const item = lines[at].match(ITEM);
    if (!item || item[2].at(-1) !== kind || RULE.test(lines[at])) break;
    const indent = item[1].length + item[2].length + 1;
    const body = [lines[at].slice(item[0].length)];
    at += 1;
    let blank = false;
    for (; at < lines.length; at += 1) {
      const line = lines[at];
      const column = indentOf(line);
      if (!line.trim()) {
        blank = true;
        body.push("");
      } else if (column >= Math.min(indent, item[1].length + 2)) {
        loose ||= blank && !ITEM.test(line.trimStart());
        body.push(outdented(line, indent));
        blank = false;
      } else if (!blank && !ITEM.test(line) && !interrupts(lines, at, depth)) {
        body.push(line.trim());
      } else {
        break;
      }
    }
    while (body.length && !body.at(-1).trim()) body.pop();
    if (blank && at < lines.length && ITEM.test(lines[at])) loose = true;
    items.push(parse(body.join("\n"), depth + 1));
  }
  return [{ kind: "list", ordered, from: ordered ? Number.parseInt(first[2], 10) : 1, loose, items }, at];
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  const found = [""];
  let code = false;
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\" && text[at + 1] === "|") {
      found[found.length - 1] += "|";
      at += 1;
    } else if (text[at] === "|" && !code) {
      found.push("");
    } else {
      if (text[at] === "`") code = !code;
      found[found.length - 1] += text[at];
    }
  }
  return found.map((cell) => cell.trim());
}

function isTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !lines[at + 1].includes("-")) return false;
  const marks = cells(lines[at + 1]);
  return marks.every((mark) => /^:?-+:?$/.test(mark)) && marks.length === cells(lines[at]).length;
}

function table(lines, start) {
  const header = cells(lines[start]);
  const aligned = cells(lines[start + 1]).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : "left"));
  const rows = [];
  let at = start + 2;
  for (; at < lines.length && lines[at].includes("|"); at += 1) {
    const row = cells(lines[at]).slice(0, header.length);
    rows.push([...row, ...Array(header.length - row.length).fill("")]);
  }
  return [{ kind: "table", header, aligned, rows }, at];
}

// Text within a block

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const EMPHASIS = { "***": ["strong", "em"], "**": ["strong"], "__": ["strong"], "*": ["em"], _: ["em"], "~~": ["del"] };

/** Nodes of a line of text. */
function inline(text, depth = 0) {
  const nodes = [];
  const nowhere = new Map(); // mark -> from where on no closing one is found: keeps unmatched marks from costing a search each
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  const put = (node) => {
    flush();
    nodes.push(node);
  };
  let at = 0;
  while (at < text.length) {
    const c = text[at];
    if (c === "\n") {
      put(el("br"));
      at += 1;
    } else if (c === "\\" && at + 1 < text.length && PUNCTUATION.test(text[at + 1])) {
      plain += text[at + 1];
      at += 2;
    } else if (c === "`") {
      const marks = run(text, at);
      const close = closingTicks(text, at + marks, marks, nowhere);
      if (close < 0) {
        plain += text.slice(at, at + marks);
        at += marks;
      } else {
        const inside = text.slice(at + marks, close).replace(/\n/g, " ");
        const padded = inside.length > 2 && inside.startsWith(" ") && inside.endsWith(" ");
        put(el("code", {}, padded ? inside.slice(1, -1) : inside));
        at = close + marks;
      }
    } else if ((c === "*" || c === "_" || c === "~") && depth < DEEPEST) {
      const found = emphasis(text, at, nowhere);
      if (found) {
        const inner = inline(text.slice(at + found.mark.length, found.close), depth + 1);
        put(EMPHASIS[found.mark].reduceRight((children, tag) => [el(tag, {}, children)], inner)[0]);
        at = found.close + found.mark.length;
      } else {
        const length = run(text, at);
        plain += text.slice(at, at + length);
        at += length;
      }
    } else if ((c === "[" || (c === "!" && text[at + 1] === "[")) && depth < DEEPEST) {
      const open = c === "[" ? at : at + 1;
      const link = linkAt(text, open);
      if (link) {
        put(anchor(link.url, inline(link.label || link.url, DEEPEST))); // no link within a link
        at = link.end;
      } else {
        plain += text.slice(at, open + 1);
        at = open + 1;
      }
    } else if (c === "h" && depth < DEEPEST && /^https?:\/\//.test(text.slice(at, at + 8)) && !/\w/.test(text[at - 1] ?? " ")) {
      const url = bareUrl(text, at);
      const node = anchor(url, [document.createTextNode(url)]);
      put(node);
      at += url.length;
    } else if (c === "<" && /^<https?:\/\//.test(text.slice(at, at + 9)) && text.indexOf(">", at) > 0) {
      const end = text.indexOf(">", at);
      const url = text.slice(at + 1, end);
      put(anchor(url, [document.createTextNode(url)]));
      at = end + 1;
    } else {
      plain += c;
      at += 1;
    }
  }
  flush();
  return nodes;
}

function run(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function closingTicks(text, from, marks, nowhere) {
  const key = `\`${marks}`;
  if (nowhere.has(key)) return -1;
  for (let at = text.indexOf("`", from); at >= 0; at = text.indexOf("`", at)) {
    const length = run(text, at);
    if (length === marks) return at;
    at += length;
  }
  nowhere.set(key, from);
  return -1;
}

/** {mark, close}, or null if nothing is emphasised from here. */
function emphasis(text, at, nowhere) {
  const c = text[at];
  const length = run(text, at);
  const mark = text.slice(at, at + Math.min(length, 4));
  if (!(mark in EMPHASIS) || nowhere.has(mark)) return null;
  const after = text[at + length];
  if (after === undefined || /\s/.test(after) || (c === "_" && /\w/.test(text[at - 1] ?? " "))) return null;
  let close = at + length;
  for (;;) {
    close = text.indexOf(c, close);
    if (close < 0) {
      nowhere.set(mark, at);
      return null;
    }
    const marks = run(text, close);
    const closes = marks === length || (marks === 3 && length < 3); // three marks end an inner emphasis and this one
    if (closes && !/\s/.test(text[close - 1]) && text[close - 1] !== "\\" && !(c === "_" && /\w/.test(text[close + marks] ?? " "))) {
      return { mark, close: close + marks - length };
    }
    close += marks;
  }
}

function linkAt(text, open) {
  const close = text.slice(open, open + LONGEST_LABEL).indexOf("](");
  if (close < 0) return null;
  const start = open + close + 2;
  let nested = 0;
  for (let at = start; at < text.length && at - start < LONGEST_URL; at += 1) {
    const c = text[at];
    if (c === "\n") return null;
    if (c === "(") nested += 1;
    if (c === ")" && nested-- === 0) {
      // What follows a space is a title, which is left out.
      const url = text.slice(start, at).trim().split(" ")[0].replace(/^<|>$/g, "");
      return { label: text.slice(open + 1, open + close), url, end: at + 1 };
    }
  }
  return null;
}

function bareUrl(text, at) {
  const url = text.slice(at, at + LONGEST_URL).match(/^[^\s<>"`]+/)[0];
  const trimmed = url.replace(/[.,;:!?*_~'")\]}]+$/, "");
  return trimmed.includes("(") && url.startsWith(`${trimmed})`) ? `${trimmed})` : trimmed;
}

/** A link where the address is a full one of the web, and otherwise its text with the address behind it: nothing is hidden or followed. */
function anchor(url, children) {
  let target = null;
  try {
    target = new URL(url);
  } catch {
    // Relative, or nonsense.
  }
  if (target === null || !["http:", "https:"].includes(target.protocol)) {
    return el("span", { class: "no-link" }, children, ` (${url})`);
  }
  return el("a", { href: target.href, target: "_blank", rel: "noopener noreferrer" }, children);
}

// Nodes

function render(block) {
  switch (block.kind) {
    case "heading":
      return el(`h${Math.min(6, block.level + 2)}`, {}, inline(block.text)); // below the question's own h2
    case "rule":
      return el("hr");
    case "code":
      return codeBlock(block);
    case "quote":
      return el("blockquote", {}, block.blocks.map(render));
    case "list": {
      const items = block.items.map((blocks) => el("li", {}, itemNodes(blocks, block.loose)));
      return block.ordered ? el("ol", { start: block.from === 1 ? null : block.from }, items) : el("ul", {}, items);
    }
    case "table": {
      const row = (tag, values) => el("tr", {}, values.map((value, i) => el(tag, { class: block.aligned[i] }, inline(value))));
      const head = el("thead", {}, row("th", block.header));
      const body = el("tbody", {}, block.rows.map((values) => row("td", values)));
      return el("div", { class: "scrolled", tabindex: "0", role: "group", "aria-label": "Table" }, el("table", {}, head, body));
    }
    default:
      return el("p", {}, inline(block.text));
  }
}

/** In a tight list paragraphs are bare text. */
function itemNodes(blocks, loose) {
  return blocks.flatMap((block) => (block.kind === "paragraph" && !loose ? inline(block.text) : [render(block)]));
}

function codeBlock(block) {
  const code = el("code", {}, block.text);
  const head = el("figcaption", {}, el("span", {}, block.language || "text"), copyButton("Copy", () => code.textContent));
  return el("figure", { class: "code" }, head, el("pre", { tabindex: "0", "aria-label": "Code" }, code));
}

/** A text that grows, drawn into a root. Blocks that are as they were keep their nodes, and with them selection, focus and scroll. */
export class MarkdownView {
  #root;
  #drawn = [];

  constructor(root) {
    this.#root = root;
  }

  update(text) {
    const blocks = parse(text);
    blocks.forEach((block, i) => {
      const before = this.#drawn[i];
      if (before === undefined) this.#root.append(render(block));
      else if (before.raw === block.raw && before.kind === block.kind) return;
      else if (before.kind === "code" && block.kind === "code" && before.language === block.language) {
        this.#root.children[i].querySelector("code").textContent = block.text;
      } else this.#root.children[i].replaceWith(render(block));
    });
    while (this.#root.children.length > blocks.length) this.#root.lastElementChild.remove();
    this.#drawn = blocks;
  }
}
