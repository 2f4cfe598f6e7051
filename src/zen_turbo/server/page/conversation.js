// Questions and answers: asking, showing how far the prompt is read, the answer as it comes, and what it cost.

import { copyButton, el } from "./dom.js";
import { explain } from "./explain.js";
import { MarkdownView } from "./markdown.js";
import { Reading } from "./reading.js";
import { save, load, tab } from "./store.js";
import { count, duration, fine, percent, plural } from "./words.js";

const LONGEST_KEPT = 2_000_000; // characters of the conversation that survive a reload
const SAY_EVERY_MS = 15_000;

// States of a turn
const WAITING = "waiting"; // for documents that are being sent
const SENT = "sent";
const READING = "reading";
const WRITING = "writing";
const DONE = "done";
const STOPPED = "stopped";
const FAILED = "failed";
const RUNNING = [WAITING, SENT, READING, WRITING];

export class Conversation {
  #turns = [];
  #views = new Map();
  #running = null; // {turn, abort}
  #leaving = false;

  /**
   * nodes: {list, notKept}. documents: what is chosen. model(): its name, or null before it is known. sampling(): of the next request.
   * say(text) announces, title(text) shows in the tab. onAgain() after a question was asked again. onChange() after each turn began or ended.
   * onUnauthorised(question): a question was refused for want of a key.
   */
  constructor(server, nodes, { documents, model, sampling, say, title, onAgain, onChange, onUnauthorised }) {
    Object.assign(this, { server, nodes, documents, model, sampling, say, title, onAgain, onChange, onUnauthorised });
    for (const turn of load(tab, "conversation", [])) {
      if (RUNNING.includes(turn.state)) {
        turn.state = STOPPED;
        turn.note = "The page was left while this was under way.";
      }
      this.#turns.push(turn);
      this.#show(turn);
    }
  }

  get running() {
    return this.#running !== null;
  }

  get empty() {
    return this.#turns.length === 0;
  }

  clear() {
    this.stop();
    this.#turns = [];
    this.#views.clear();
    this.nodes.list.replaceChildren();
    this.keep();
    this.onChange();
  }

  stop() {
    this.#running?.abort.abort();
  }

  /** Messages of the next request: the turns that were answered, and the question. Documents belong to the first message, files before its text. */
  messages(question, { withDocuments }) {
    const asked = this.#turns.filter((turn) => turn.answer && !RUNNING.includes(turn.state));
    const messages = asked.flatMap((turn) => [
      { role: "user", content: turn.question },
      { role: "assistant", content: turn.answer },
    ]);
    if (question) messages.push({ role: "user", content: question });
    if (withDocuments && messages.length && this.documents.chosen.length) {
      const files = this.documents.chosen.map((document) => ({ type: "file", file: { file_id: document.id } }));
      messages[0] = { role: "user", content: [...files, { type: "text", text: messages[0].content }] };
    }
    return messages;
  }

  /** Gives whether the question was taken: one at a time, and not before the model is known. */
  ask(question) {
    if (this.running || this.model() === null) return false;
    const turn = { question, answer: "", thoughts: "", state: this.documents.busy ? WAITING : SENT, facts: null, error: null };
    this.#turns.push(turn);
    this.#show(turn).node.scrollIntoView({ block: "start" });
    this.#run(turn);
    return true;
  }

  /** Asks a turn's question again, in a turn of its own at the end. */
  #again(turn) {
    if (this.running) return;
    this.#forget(turn);
    this.ask(turn.question);
    this.onAgain();
  }

  /** What is sent for a turn. A document that is still on its way belongs to it: the question waits. Null, and why in the turn, if one failed. */
  async #request(turn, signal) {
    const failed = await this.documents.settled(signal);
    if (failed.length) {
      const others = failed.length > 1 ? ` and ${count(failed.length - 1)} more` : "";
      turn.state = STOPPED;
      turn.note = `Not asked: ${failed[0].name}${others} could not be added. Look at the documents, then ask again.`;
      return null;
    }
    turn.state = SENT;
    turn.documents = this.documents.chosen.length;
    turn.tokens = this.documents.tokens;
    return { model: this.model(), messages: this.messages(turn.question, { withDocuments: true }), ...this.sampling() };
  }

  async #run(turn) {
    const abort = new AbortController();
    this.#running = { turn, abort };
    this.onChange();
    this.keep();
    const view = this.#views.get(turn);
    const tick = setInterval(() => view.update(), 1000); // time left counts down between chunks
    try {
      const request = await this.#request(turn, abort.signal);
      if (request === null) return;
      view.update();
      this.say("Sent.");
      for await (const chunk of this.server.chat(request, abort.signal)) this.#take(turn, view, chunk);
      turn.state = DONE;
      this.title(document.hidden ? "Answered" : "");
      this.say("The answer is complete.");
    } catch (error) {
      this.title("");
      if (abort.signal.aborted) {
        turn.state = STOPPED;
        turn.note = turn.answer ? "Stopped." : "Stopped. What was read is kept, so asking again goes on from there.";
        this.say("Stopped.");
      } else if (error.status === 401) {
        this.#forget(turn);
        this.onUnauthorised(turn.question);
      } else {
        turn.state = FAILED;
        turn.error = { ...explain(error), retryAt: error.retryAfterS === null ? null : Date.now() + 1000 * error.retryAfterS };
        if (error.status === 404 || error.code?.includes("file")) this.documents.refresh().catch(() => {}); // a document that is gone, most likely
      }
    } finally {
      clearInterval(tick);
      this.#running = null;
      view.reading = null;
      view.update();
      this.keep();
      this.onChange();
    }
  }

  #forget(turn) {
    this.#turns = this.#turns.filter((each) => each !== turn);
    this.#views.get(turn).node.remove();
    this.#views.delete(turn);
  }

  #take(turn, view, chunk) {
    if (chunk.prompt_progress) {
      turn.state = READING;
      view.reading ??= new Reading();
      view.reading.add(chunk.prompt_progress);
      this.title(`${percent(chunk.prompt_progress.processed, chunk.prompt_progress.total)} read`);
      this.#sayNowAndThen(view);
    }
    const choice = chunk.choices?.[0];
    if (choice?.delta?.reasoning_content) turn.thoughts += choice.delta.reasoning_content;
    if (choice?.delta?.content) turn.answer += choice.delta.content;
    if ((choice?.delta?.content || choice?.delta?.reasoning_content) && turn.state !== WRITING) {
      turn.state = WRITING;
      this.title("Answering");
      this.say("The answer begins.");
    }
    if (choice?.finish_reason) turn.facts = { ...turn.facts, finish: choice.finish_reason, ...chunk.zen_turbo };
    if (chunk.usage) turn.facts = { ...turn.facts, ...usageFacts(chunk.usage) };
    view.update();
  }

  #said = 0;

  #sayNowAndThen(view) {
    if (performance.now() - this.#said < SAY_EVERY_MS) return;
    this.#said = performance.now();
    const { lead, number, rest } = view.reading.sentence();
    this.say(lead + number + rest);
  }

  #show(turn) {
    const view = new TurnView(turn, () => this.#again(turn));
    this.#views.set(turn, view);
    this.nodes.list.append(view.node);
    view.draw();
    return view;
  }

  /** Half an answer survives too. What the browser does to the stream after this is no failure of the server's. */
  leave() {
    this.keep();
    this.#leaving = true;
  }

  /** The page was not gone for good: the browser had only put it away. */
  comeBack() {
    this.#leaving = false;
  }

  keep() {
    if (this.#leaving) return;
    const small = JSON.stringify(this.#turns).length <= LONGEST_KEPT;
    const kept = save(tab, "conversation", small ? this.#turns : null) && small;
    this.nodes.notKept.hidden = kept;
  }
}

function usageFacts(usage) {
  return { prompt: usage.prompt_tokens, cached: usage.prompt_tokens_details?.cached_tokens ?? null, written: usage.completion_tokens };
}

/** The nodes of one turn. Drawn at most once per frame. */
class TurnView {
  reading = null;
  #turn;
  #pending = false;
  #markdown;
  #parts;

  constructor(turn, onAgain) {
    this.#turn = turn;
    const part = (tag, attributes) => el(tag, { ...attributes, hidden: true });
    const bar = part("div", { class: "bar", role: "progressbar", "aria-label": "Reading the prompt", "aria-valuemin": "0" });
    bar.append(el("span", { class: "known" }), el("span", { class: "read" }));
    const thoughts = part("details", { class: "thoughts" });
    thoughts.append(el("summary", {}, "Thoughts"), el("p"));
    this.#parts = {
      about: part("p", { class: "about" }),
      line: part("p", { class: "reading" }),
      bar,
      thoughts,
      answer: part("div", { class: "answer" }),
      note: part("div", { class: "note" }),
      again: part("button", { type: "button", class: "again", onclick: onAgain }),
      facts: part("dl", { class: "facts" }),
      copy: part("div", { class: "actions" }),
    };
    this.#parts.copy.append(copyButton("Copy answer", () => turn.answer));
    this.#markdown = new MarkdownView(this.#parts.answer);
    const long = turn.question.length > 400 ? { class: "question long", tabindex: "0" } : { class: "question" };
    this.node = el("li", { class: "turn" }, el("h2", long, turn.question), ...Object.values(this.#parts));
  }

  update() {
    if (this.#pending) return;
    this.#pending = true;
    requestAnimationFrame(() => {
      this.#pending = false;
      const page = document.scrollingElement;
      const following = page.scrollHeight - innerHeight - page.scrollTop < 120;
      this.draw();
      if (following) page.scrollTop = page.scrollHeight;
    });
  }

  draw() {
    const turn = this.#turn;
    const { about, line, bar, thoughts, answer, note, again, facts, copy } = this.#parts;
    this.node.dataset.state = turn.state;
    this.node.setAttribute("aria-busy", String(RUNNING.includes(turn.state)));
    about.hidden = turn.documents === undefined;
    if (turn.documents) about.textContent = `With ${plural(turn.documents, "document")}, ${plural(turn.tokens, "token")}`;
    else about.textContent = "Without documents";
    line.hidden = ![WAITING, SENT, READING].includes(turn.state);
    bar.hidden = turn.state !== READING;
    if (turn.state === WAITING) line.textContent = "Waiting until the documents are sent";
    if (turn.state === SENT) line.textContent = "Sent, waiting for the server";
    if (turn.state === READING && this.reading) this.#drawReading(line, bar);
    thoughts.hidden = !turn.thoughts;
    if (turn.thoughts) thoughts.lastElementChild.textContent = turn.thoughts;
    answer.hidden = !turn.answer;
    this.#markdown.update(turn.answer);
    this.#drawNote(note, again);
    facts.hidden = !(turn.state === DONE && turn.facts);
    if (!facts.hidden) facts.replaceChildren(...factNodes(turn.facts));
    copy.hidden = !(turn.answer && !RUNNING.includes(turn.state));
  }

  #drawReading(line, bar) {
    const { total, cache, processed } = this.reading.progress;
    const { lead, number, rest } = this.reading.sentence();
    line.replaceChildren(lead, el("strong", {}, number), rest);
    bar.setAttribute("aria-valuemax", total);
    bar.setAttribute("aria-valuenow", processed);
    bar.setAttribute("aria-valuetext", lead + number + rest);
    const [known, read] = bar.children;
    known.style.width = `${(100 * cache) / total}%`;
    read.style.width = `${(100 * (processed - cache)) / total}%`;
  }

  #drawNote(note, again) {
    const turn = this.#turn;
    const notes = [];
    if (turn.state === FAILED) notes.push(el("strong", {}, `${turn.error.title}. `), turn.error.text);
    else if (turn.state === STOPPED) notes.push(turn.note);
    else if (turn.state === DONE && !turn.answer) notes.push("The model ended its answer without writing anything.");
    else if (turn.state === DONE && turn.facts?.finish === "length") {
      notes.push("The answer reached its longest length and ends here. Settings, below the question, has the limit.");
    }
    if (note.hidden && notes.length) note.setAttribute("role", turn.state === FAILED ? "alert" : "note");
    note.classList.toggle("error", turn.state === FAILED);
    note.hidden = !notes.length;
    note.replaceChildren(...notes);
    again.hidden = !(turn.state === FAILED || (turn.state === STOPPED && !turn.answer));
    if (again.hidden) return;
    const wait = Math.ceil(((turn.error?.retryAt ?? 0) - Date.now()) / 1000);
    again.disabled = wait > 0;
    again.textContent = wait > 0 ? `Ask again in ${wait}\u00a0s` : "Ask again";
    if (wait > 0) setTimeout(() => this.update(), 1000);
  }
}

/** What an answer cost and what a sparse reading kept, as terms and values. */
function factNodes(facts) {
  const pairs = [];
  if (facts.prompt !== undefined) pairs.push(["Prompt", plural(facts.prompt, "token")]);
  if (facts.cached !== null && facts.cached !== undefined) pairs.push(["Cached", `${count(facts.cached)} (${percent(facts.cached, facts.prompt)})`]);
  if (Number.isFinite(facts.ttft_s)) pairs.push(["TTFT", duration(facts.ttft_s)]);
  if (Number.isFinite(facts.density)) pairs.push(["Density", fine(facts.density)]);
  if (Number.isFinite(facts.recall)) pairs.push(["Recall", fine(facts.recall)]);
  else if (facts.density === 1) pairs.push(["Recall", "all was read"]);
  if (facts.written !== undefined) {
    const rate = facts.written > 1 && facts.decode_s > 0 ? `, ${((facts.written - 1) / facts.decode_s).toFixed(1)} per s` : "";
    pairs.push(["Answer", plural(facts.written, "token") + rate]);
  }
  return pairs.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value)));
}
