// The field for the question: its keys, its size, what the prompt will be in tokens, and how the answer is to be written.

import { browser, load, save, tab } from "./store.js";
import { count, percent, plural } from "./words.js";

const touch = () => matchMedia("(pointer: coarse)").matches;

const COUNT_AFTER_MS = 400; // without a key pressed
const LONGEST_DRAFT = 200_000; // characters that survive a reload

export class Composer {
  #limit = null;
  #written = 0;
  #counting = null;
  #timer = 0;

  /** nodes: {form, question, ask, stop, total, temperature, longest}. onAsk(text) gives whether the question was taken. say(text) announces. */
  constructor(nodes, { onAsk, onStop, countTokens, documents, say }) {
    Object.assign(this, { nodes, countTokens, documents, say });
    const { form, question, stop, temperature, longest } = nodes;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (question.value.trim() && onAsk(question.value.trim())) this.text = "";
    });
    stop.addEventListener("click", onStop);
    question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.isComposing) return;
      // Where there is no keyboard beside the screen, its return key is the only way to a new line.
      const plain = !event.shiftKey && !event.altKey && !touch();
      if (!event.ctrlKey && !event.metaKey && !plain) return;
      event.preventDefault();
      form.requestSubmit();
    });
    question.addEventListener("input", () => this.#edited());
    documents.addEventListener("change", () => this.#show());
    const settings = load(browser, "settings", {});
    temperature.value = settings.temperature ?? "0";
    longest.value = settings.longest ?? "";
    for (const field of [temperature, longest]) {
      field.addEventListener("change", () => save(browser, "settings", { temperature: temperature.value, longest: longest.value }));
    }
    question.value = load(tab, "draft", "");
    this.#fit();
  }

  set limit(limit) {
    this.#limit = limit;
    this.recount();
  }

  get text() {
    return this.nodes.question.value;
  }

  set text(text) {
    this.nodes.question.value = text;
    this.#edited();
  }

  focus() {
    this.nodes.question.focus();
  }

  /** While an answer is on its way the place of Ask is Stop's. Focus follows. */
  set running(running) {
    const { ask, stop } = this.nodes;
    const focused = document.activeElement === (running ? ask : stop);
    ask.hidden = running;
    stop.hidden = !running;
    // A touch screen's keyboard comes up when it is called for, not when an answer ends.
    if (focused) (running ? stop : touch() ? ask : this.nodes.question).focus();
  }

  /** Sampling for the request. What is not set is the server's to decide; what is out of range the server refuses by name. */
  get sampling() {
    const { temperature, longest } = this.nodes;
    const values = {};
    if (temperature.value !== "") values.temperature = temperature.valueAsNumber;
    if (longest.value !== "") values.max_completion_tokens = longest.valueAsNumber;
    return values;
  }

  #edited() {
    this.#fit();
    save(tab, "draft", this.text.length <= LONGEST_DRAFT ? this.text : null);
    this.recount();
  }

  #fit() {
    const { question } = this.nodes;
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight + 2}px`;
  }

  /** Counts conversation and question, without documents: those are counted once, when they are sent, and may take seconds. */
  recount() {
    clearTimeout(this.#timer);
    this.#counting?.abort();
    this.#timer = setTimeout(async () => {
      const counting = (this.#counting = new AbortController());
      try {
        this.#written = await this.countTokens(this.text, counting.signal);
      } catch {
        if (counting.signal.aborted) return;
        this.#written = 0; // only the figure is missing; asking will say what is wrong
      }
      this.#show();
    }, COUNT_AFTER_MS);
  }

  #show() {
    const { total } = this.nodes;
    const tokens = this.documents.tokens + this.#written;
    const over = this.#limit !== null && tokens > this.#limit;
    const news = over && !total.classList.contains("over");
    total.classList.toggle("over", over);
    if (this.#limit === null) total.textContent = "";
    else if (over) {
      total.textContent =
        `About ${plural(tokens, "token")}: more than the ${count(this.#limit)} this model takes. ` +
        "Take out a document or start a new conversation.";
    } else if (tokens > 0) total.textContent = `About ${plural(tokens, "token")} (${percent(tokens, this.#limit)})`;
    else total.textContent = "";
    if (news) this.say(total.textContent);
  }
}
