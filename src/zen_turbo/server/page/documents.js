// The documents: sent to the server, kept there, chosen for the conversation. Files of one dropped folder are shown as one row that opens.

import { explain } from "./explain.js";
import { el } from "./dom.js";
import { browser, load, save } from "./store.js";
import { bytes, count, percent, plural } from "./words.js";

const AT_ONCE = 3;
const REMEMBERED = 20_000; // ids of chosen documents
const KEEP_AFTER_MS = 300;
const SHOWN_SKIPPED = 200;

const READY = "ready"; // on the server, counted
const WAITING = "waiting";
const SENDING = "sending";
const FAILED = "failed";

/** One document. tokens is null where the server did not say. */
class Document {
  constructor(values) {
    Object.assign(this, { id: null, file: null, tokens: null, size: 0, state: WAITING, sent: 0, failure: null, chosen: true }, values);
  }

  get folder() {
    return this.name.includes("/") ? this.name.slice(0, this.name.indexOf("/")) : null;
  }

  get counts() {
    return this.chosen && this.state === READY;
  }

  get meta() {
    switch (this.state) {
      case READY:
        return this.tokens === null ? bytes(this.size) : plural(this.tokens, "token");
      case SENDING:
        return this.sent < 1 ? `sending, ${percent(this.sent, 1)}` : "being counted";
      case FAILED:
        return `${this.failure.title}: ${this.failure.text}`;
      default:
        return "waiting";
    }
  }
}

export class Documents extends EventTarget {
  #all = []; // in the order of the prompt: what is added goes behind, so that what the server has read stays a prefix
  #rows = new Map();
  #open = new Set();
  #sending = 0;
  #paused = false;
  #drawing = false;
  #loaded = false;
  #keeping = 0;
  #limit = null;

  /** nodes: {list, sum, share, skipped}. say(text) announces; confirm(question, action) asks, and gives whether the answer was yes. */
  constructor(server, nodes, say, confirm) {
    super();
    Object.assign(this, { server, nodes, say, confirm });
  }

  /** Longest prompt in tokens. */
  set limit(limit) {
    this.#limit = limit;
    this.#changed();
  }

  get chosen() {
    return this.#all.filter((document) => document.counts);
  }

  get tokens() {
    return this.chosen.reduce((sum, document) => sum + (document.tokens ?? 0), 0);
  }

  get busy() {
    return this.#all.some((document) => document.state === WAITING || document.state === SENDING);
  }

  // "arrival" and not "change": that one comes with drawing, and nothing is drawn in a tab that nobody looks at.
  /** When what is being sent has arrived. Gives those of it that did not. Raises the signal's reason if it aborts. */
  async settled(signal) {
    const pending = this.#all.filter((document) => document.state === WAITING || document.state === SENDING);
    const under = () => pending.some((document) => this.#all.includes(document) && (document.state === WAITING || document.state === SENDING));
    while (under()) {
      await new Promise((resolve) => {
        this.addEventListener("arrival", resolve, { once: true, signal });
        signal.addEventListener("abort", resolve, { once: true });
      });
      signal.throwIfAborted();
    }
    return pending.filter((document) => document.state === FAILED && this.#all.includes(document));
  }

  get empty() {
    return this.#all.length === 0;
  }

  /** The server's list, with what was chosen before. Uploads that wait go on. Raises ApiError. */
  async refresh() {
    const chosen = new Set(load(browser, "chosen", []));
    const files = await this.server.files();
    const found = files.map((file) => this.#known(file) ?? fromServer(file, chosen.has(file.id)));
    const order = new Map(this.#all.map((document, i) => [document, i]));
    const rank = (document) => order.get(document) ?? document.created - 1e15; // those of earlier visits come first, oldest first
    found.sort((a, b) => rank(a) - rank(b));
    this.#all = [...found, ...this.#all.filter((document) => document.id === null)];
    this.#paused = false;
    this.#loaded = true;
    this.#changed();
    this.#send();
  }

  #known(file) {
    return this.#all.find((document) => document.id === file.id);
  }

  /** Takes what intake.js gives: queues the files, tells what was left out. */
  add({ files, skipped }) {
    for (const { file, name } of files) this.#all.push(new Document({ name, file, size: file.size }));
    this.#showSkipped(skipped);
    const left = skipped.length ? `, ${plural(skipped.length, "entry", "entries")} left out` : "";
    this.say(files.length ? `${plural(files.length, "file")} added${left}.` : `Nothing to add${left}.`);
    this.#changed();
    this.#send();
  }

  #send() {
    while (!this.#paused && this.#sending < AT_ONCE) {
      const next = this.#all.find((document) => document.state === WAITING);
      if (next === undefined) return;
      this.#sending += 1;
      this.#sendOne(next).finally(() => {
        this.#sending -= 1;
        this.#send();
      });
    }
  }

  async #sendOne(document) {
    Object.assign(document, { state: SENDING, sent: 0 });
    this.#changed();
    try {
      const onSent = (share) => {
        document.sent = share;
        this.#changed();
      };
      const file = await this.server.upload(document.file, document.name, onSent);
      if (!this.#all.includes(document)) {
        await this.server.deleteFile(file.id); // taken off the list while it was being sent
        return;
      }
      const twin = this.#known(file);
      if (twin !== undefined) {
        this.#all = this.#all.filter((each) => each !== document);
        twin.chosen = true;
        this.say(`${document.name} is there already.`);
      }
      Object.assign(twin ?? document, fieldsOf(file), { name: document.name, file: null });
      if (!this.busy) this.say(`${this.#sumText()}.`);
    } catch (error) {
      if (error.status === 401) {
        this.#paused = true; // until there is a key; refresh() goes on
        document.state = WAITING;
      } else {
        Object.assign(document, { state: FAILED, failure: explain(error) });
        this.say(`${document.name} could not be added. ${document.failure.text}`);
      }
    }
    this.#changed();
    this.dispatchEvent(new Event("arrival"));
  }

  async #remove(documents, what) {
    const kept = documents.filter((document) => document.id !== null);
    if (kept.length && !(await this.confirm(`Delete ${what} from the server?`, "Delete"))) return;
    const gone = new Set(documents.filter((document) => document.id === null));
    const queue = [...kept];
    const failures = [];
    const work = async () => {
      for (let document = queue.shift(); document; document = queue.shift()) {
        try {
          await this.server.deleteFile(document.id);
          gone.add(document);
        } catch (error) {
          if (error.status === 404) gone.add(document); // somebody else was faster
          else failures.push(error);
        }
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, work));
    this.#all = this.#all.filter((document) => !gone.has(document));
    this.dispatchEvent(new Event("arrival"));
    this.#changed();
    this.say(failures.length ? `Not deleted: ${explain(failures[0]).text}` : `${what} deleted.`);
    if (failures.length) this.#notice(`${plural(failures.length, "document")} could not be deleted. ${explain(failures[0]).text}`);
    (this.nodes.list.querySelector("input, button") ?? this.nodes.fallbackFocus).focus();
  }

  // Drawing: once per frame, however many files report at once.

  #changed() {
    if (this.#drawing) return;
    this.#drawing = true;
    requestAnimationFrame(() => {
      this.#drawing = false;
      this.#draw();
      this.#keeping ||= setTimeout(() => this.keep(), KEEP_AFTER_MS);
      this.dispatchEvent(new Event("change"));
    });
  }

  /** Remembers what is chosen. Before the list is there that is not known, and what is remembered must not be overwritten. */
  keep() {
    clearTimeout(this.#keeping);
    this.#keeping = 0;
    if (this.#loaded) save(browser, "chosen", this.chosen.slice(-REMEMBERED).map((document) => document.id));
  }

  #sumText() {
    const chosen = this.chosen.length;
    const ready = this.#all.filter((document) => document.state === READY).length;
    if (ready === 0) return this.empty ? "None yet" : "None ready yet";
    const which = chosen === ready ? plural(chosen, "document") : `${count(chosen)} of ${plural(ready, "document")}`;
    const share = this.#limit ? `, ${percent(this.tokens, this.#limit)} of the context` : "";
    return `${which}, ${plural(this.tokens, "token")}${share}`;
  }

  #draw() {
    const { list, sum, share } = this.nodes;
    sum.textContent = this.#sumText();
    const part = this.#limit ? this.tokens / this.#limit : 0;
    share.hidden = this.empty;
    share.firstElementChild.style.width = `${100 * Math.min(1, part)}%`;
    share.classList.toggle("over", part > 1);
    const wanted = [];
    const folders = new Map();
    for (const document of this.#all) {
      if (document.folder === null) wanted.push([document, [document]]);
      else if (folders.has(document.folder)) folders.get(document.folder).push(document);
      else {
        folders.set(document.folder, [document]);
        wanted.push([`folder ${document.folder}`, folders.get(document.folder)]);
      }
    }
    this.#sync(list, wanted.map(([key, documents]) => (key === documents[0] ? this.#row(key, false) : this.#folderRow(key, documents))));
    const used = new Set([...this.#all, ...wanted.map(([key]) => key)]);
    for (const key of this.#rows.keys()) if (!used.has(key)) this.#rows.delete(key);
  }

  /** Makes the children these nodes, moving none that is where it belongs: focus and scroll stay. */
  #sync(parent, nodes) {
    nodes.forEach((node, i) => {
      if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] ?? null);
    });
    while (parent.children.length > nodes.length) parent.lastElementChild.remove();
  }

  #row(document, inFolder) {
    let row = this.#rows.get(document);
    if (row === undefined) {
      const box = el("input", { type: "checkbox", onchange: () => ((document.chosen = box.checked), this.#changed()) });
      const name = el("span", { class: "name" }, inFolder ? document.name.slice(document.folder.length + 1) : document.name);
      const meta = el("span", { class: "meta" });
      const again = el("button", { type: "button", class: "quiet", hidden: true, onclick: () => this.#again([document]) }, "Try again");
      const remove = removeButton(document.name, () => this.#remove([document], document.name));
      row = el("li", { class: "document" }, el("label", {}, box, el("span", { class: "text" }, name, meta)), again, remove);
      row.update = () => {
        box.checked = document.chosen;
        box.disabled = document.state === FAILED;
        meta.textContent = document.meta;
        again.hidden = document.state !== FAILED;
        row.dataset.state = document.state;
      };
      this.#rows.set(document, row);
    }
    row.update();
    return row;
  }

  #folderRow(key, documents) {
    let row = this.#rows.get(key);
    if (row === undefined) {
      const folder = documents[0].folder;
      const box = el("input", { type: "checkbox" });
      const meta = el("span", { class: "meta" });
      const inside = el("ul", { class: "inside", hidden: true });
      const toggle = el("button", { type: "button", class: "quiet", "aria-expanded": "false" }, "Show files");
      const again = el("button", { type: "button", class: "quiet", hidden: true }, "Try again");
      const remove = removeButton(`folder ${folder}`, () => this.#remove(row.documents, `${folder}/ with ${plural(row.documents.length, "file")}`));
      const label = el("label", {}, box, el("span", { class: "text" }, el("span", { class: "name" }, `${folder}/`), meta));
      row = el("li", { class: "document folder" }, label, remove, el("div", { class: "actions" }, toggle, again), inside);
      box.addEventListener("change", () => {
        for (const document of row.documents) document.chosen = box.checked;
        this.#changed();
      });
      toggle.addEventListener("click", () => {
        if (!this.#open.delete(key)) this.#open.add(key);
        this.#changed();
      });
      again.addEventListener("click", () => this.#again(row.documents.filter((document) => document.state === FAILED)));
      row.update = () => {
        const all = row.documents;
        const in_ = (state) => all.filter((document) => document.state === state).length;
        const chosen = all.filter((document) => document.chosen).length;
        box.checked = chosen === all.length;
        box.indeterminate = chosen > 0 && chosen < all.length;
        const tokens = all.reduce((sum, document) => sum + (document.tokens ?? 0), 0);
        const parts = [plural(all.length, "file"), plural(tokens, "token")];
        const left = in_(WAITING) + in_(SENDING);
        if (left) parts.push(`${count(left)} being sent`);
        if (in_(FAILED)) parts.push(`${count(in_(FAILED))} failed`);
        meta.textContent = parts.join(", ");
        again.hidden = in_(FAILED) === 0;
        const open = this.#open.has(key);
        toggle.textContent = open ? "Hide files" : "Show files";
        toggle.setAttribute("aria-expanded", String(open));
        inside.hidden = !open;
        this.#sync(inside, open ? all.map((document) => this.#row(document, true)) : []);
      };
      this.#rows.set(key, row);
    }
    row.documents = documents;
    row.update();
    return row;
  }

  #again(documents) {
    for (const document of documents) Object.assign(document, { state: WAITING, failure: null });
    this.#changed();
    this.#send();
  }

  #showSkipped(skipped) {
    if (!skipped.length) return this.nodes.skipped.replaceChildren();
    const reasons = new Map();
    for (const { reason } of skipped) reasons.set(reason, (reasons.get(reason) ?? 0) + 1);
    const summary = [...reasons].map(([reason, n]) => `${count(n)} ${reason}`).join(", ");
    const items = skipped.slice(0, SHOWN_SKIPPED).map(({ name, reason }) => el("li", {}, `${name}: ${reason}`));
    if (skipped.length > SHOWN_SKIPPED) items.push(el("li", {}, `and ${count(skipped.length - SHOWN_SKIPPED)} more`));
    const details = el("details", {}, el("summary", {}, `${count(skipped.length)} left out: ${summary}`), el("ul", {}, ...items));
    this.#notice(details);
  }

  #notice(content) {
    const close = el("button", { type: "button", class: "quiet", onclick: () => this.nodes.skipped.replaceChildren() }, "Dismiss");
    this.nodes.skipped.replaceChildren(el("div", { class: "note" }, content, close));
  }
}

function removeButton(name, action) {
  return el("button", { type: "button", class: "quiet remove", "aria-label": `Delete ${name}`, title: "Delete", onclick: action }, "\u00d7");
}

function fieldsOf(file) {
  const failed = file.status === "error";
  const tokens = file.zen_turbo?.tokens;
  return {
    id: file.id,
    size: file.bytes,
    created: file.created_at ?? 0,
    tokens: Number.isFinite(tokens) ? tokens : null,
    state: failed ? FAILED : READY,
    failure: failed ? { title: "Not readable", text: file.status_details ?? "The server could not read it." } : null,
  };
}

const fromServer = (file, chosen) => new Document({ name: file.filename, chosen, ...fieldsOf(file) });
