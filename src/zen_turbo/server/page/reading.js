// How far a prompt is read, from the server's prompt_progress, and when it will be done.

import { count, percent, timeLeft } from "./words.js";

const NEWEST = 0.3; // weight of the newest chunk: later chunks cost more than earlier ones, and one slow chunk is no trend

/** One prompt being read. Times in ms; ``now`` is a clock. */
export class Reading {
  #now;
  #msPerToken = null;
  #last = null;
  #at = 0;

  constructor(now = () => performance.now()) {
    this.#now = now;
  }

  /** progress: {total, cache, processed, time_ms}; processed includes cache. */
  add(progress) {
    const last = this.#last;
    if (last !== null && progress.processed > last.processed && progress.time_ms >= last.time_ms) {
      const newest = (progress.time_ms - last.time_ms) / (progress.processed - last.processed);
      this.#msPerToken = this.#msPerToken === null ? newest : NEWEST * newest + (1 - NEWEST) * this.#msPerToken;
    }
    this.#last = progress;
    this.#at = this.#now();
  }

  get progress() {
    return this.#last;
  }

  /** Seconds until all is read, or null before the first chunk. Counts down between chunks, which may take long. */
  secondsLeft() {
    if (this.#msPerToken === null) return null;
    const { total, processed } = this.#last;
    return Math.max(0, (total - processed) * this.#msPerToken - (this.#now() - this.#at)) / 1000;
  }

  /** Parts of the sentence: the count that is read now, and what follows. */
  sentence() {
    const { total, cache, processed } = this.#last;
    const left = this.secondsLeft();
    const parts = [` of ${count(total)} tokens (${percent(processed, total)})`];
    if (left !== null && processed < total) parts.push(timeLeft(left));
    if (cache > 0) parts.push(`${count(cache)} were known already`);
    return { lead: "Reading: ", number: count(processed), rest: parts.join(", ") };
  }
}
