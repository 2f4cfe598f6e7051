// Errors as sentences that say what to do.

import { bytes, count } from "./words.js";

/** {title, text} for an ApiError; text ends with what a person can do. */
export function explain(error) {
  const facts = error.details ?? {};
  const wait = error.retryAfterS === null ? "in a moment" : error.retryAfterS === 1 ? "in 1 second" : `in ${count(error.retryAfterS)} seconds`;
  switch (error.code) {
    case "context_length_exceeded":
      return {
        title: "Too long for this model",
        text:
          Number.isFinite(facts.n_prompt_tokens) && Number.isFinite(facts.n_ctx)
            ? `Documents and conversation are ${count(facts.n_prompt_tokens)} tokens; with the answer, the model takes ${count(facts.n_ctx)}. ` +
              "Take out a document or start a new conversation, then ask again."
            : `${sentence(error.message)} Take out a document or start a new conversation, then ask again.`,
      };
    case "insufficient_memory":
      return {
        title: "Not enough memory",
        text:
          (Number.isFinite(facts.need_bytes) && Number.isFinite(facts.have_bytes)
            ? `This needs ${bytes(facts.need_bytes)} and the server can use ${bytes(facts.have_bytes)}. `
            : `${sentence(error.message)} `) +
          "Take out a document, or start the server with --kv-dtype int8, which halves what a token needs, or with --store FOLDER, " +
          "which adds disk to memory.",
      };
    case "loading":
      return { title: "The model is being loaded", text: `Nothing is lost: ask again ${wait}.` };
    case "file_not_found":
      return {
        title: "A document is gone",
        text: `${sentence(error.message)} The list of documents is up to date again: look at it, then ask again.`,
      };
    case "connection_lost":
      return {
        title: "The connection was lost",
        text: "Check that the server is running and that this device can reach it, then ask again. What it has read it keeps while it runs.",
      };
    case "internal_error":
      return { title: "The server made a mistake", text: "Its log says which one. Asking again may work; if not, please report it." };
  }
  switch (error.status) {
    case 401:
      return { title: "The server asks for an API key", text: "Enter it above, then ask again." };
    case 413:
      return {
        title: "Too large to send",
        text:
          Number.isFinite(facts.num_bytes) && Number.isFinite(facts.max_bytes)
            ? `This is ${bytes(facts.num_bytes)} and the server takes ${bytes(facts.max_bytes)}. Split the file, or have the limit raised.`
            : "The server, or a proxy in front of it, takes no request of this size. Split the file, or have the limit raised (nginx: " +
              "client_max_body_size).",
      };
    case 429:
      return { title: "The server is busy", text: `Nothing is lost: try again ${wait}.` };
    case 502:
    case 503:
    case 504:
      return { title: "The server is not ready", text: `Nothing is lost: try again ${wait}.` };
  }
  return { title: "That did not work", text: sentence(error.message) };
}

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
