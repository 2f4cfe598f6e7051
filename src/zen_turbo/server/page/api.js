// The server's API: requests, uploads with progress, and the stream of an answer. Every failure is an ApiError.

const PING_S = 10; // the server breaks its silence this often, so that a connection which died without a word is noticed
const SILENCE_MS = 60_000;
const UPLOADED_PURPOSE = "user_data";

/** status 0: there was no answer. code, details: the server's own; retryAfterS: when it asks to be tried again, or null. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "connection_lost", details = {}, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { status, code, details, retryAfterS });
  }
}

/** What a proxy in front of the server says is no JSON; the status is then all there is. */
function errorOf(status, text, retryAfter) {
  let error = null;
  try {
    error = JSON.parse(text).error;
  } catch {
    // Not ours.
  }
  const seconds = Number.parseInt(retryAfter ?? "", 10);
  const retryAfterS = Number.isFinite(seconds) && seconds >= 0 ? Math.min(seconds, 3600) : null;
  const known = error !== null && typeof error === "object";
  const message = known && typeof error.message === "string" ? error.message : `The server answered with status ${status}.`;
  return new ApiError(message, { status, code: (known && error.code) || `http_${status}`, details: known ? error : {}, retryAfterS });
}

const lost = () => new ApiError("The connection to the server was lost.");

export class Server {
  /** key: the API key, or "". onUnauthorised: called for each 401. Paths are relative, so that a proxy may serve all of it below a prefix. */
  constructor(key, onUnauthorised) {
    this.key = key;
    this.onUnauthorised = onUnauthorised;
  }

  #headers() {
    return this.key ? { Authorization: `Bearer ${this.key}` } : {};
  }

  #refused(error) {
    if (error.status === 401) this.onUnauthorised();
    return error;
  }

  /** The response, whose status is good. Raises ApiError, and AbortError if the signal aborted. */
  async #send(path, { method = "GET", json = undefined, signal = undefined } = {}) {
    const headers = { ...this.#headers(), ...(json === undefined ? {} : { "Content-Type": "application/json" }) };
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: json === undefined ? undefined : JSON.stringify(json) });
      if (response.ok) return response;
      throw errorOf(response.status, await response.text(), response.headers.get("Retry-After"));
    } catch (error) {
      if (error instanceof ApiError) throw this.#refused(error);
      if (signal?.aborted) throw error;
      throw lost();
    }
  }

  async #json(path, options) {
    const response = await this.#send(path, options);
    try {
      return await response.json();
    } catch (error) {
      if (options?.signal?.aborted) throw error;
      throw lost();
    }
  }

  /** {name, limit}: the model that is served, and its longest prompt plus answer in tokens. */
  async model() {
    const [card] = (await this.#json("v1/models")).data;
    return { name: card.id, limit: card.max_model_len };
  }

  async files() {
    const found = [];
    let after = "";
    for (;;) {
      const page = await this.#json(`v1/files${after}`);
      found.push(...page.data);
      const last = page.data.at(-1)?.id;
      if (!page.has_more || last === undefined) return found;
      after = `?after=${encodeURIComponent(last)}`;
    }
  }

  async deleteFile(id) {
    await this.#send(`v1/files/${encodeURIComponent(id)}`, { method: "DELETE" });
  }

  /** Sends one file under a name. onSent(share) is told how much of it is sent, 0 to 1. Gives the server's file object. */
  upload(file, name, onSent) {
    return new Promise((resolve, reject) => {
      const form = new FormData();
      form.append("purpose", UPLOADED_PURPOSE);
      form.append("file", file, name);
      const request = new XMLHttpRequest(); // fetch does not say how much is sent
      request.open("POST", "v1/files");
      for (const [header, value] of Object.entries(this.#headers())) request.setRequestHeader(header, value);
      request.upload.onprogress = (event) => event.lengthComputable && onSent(event.loaded / event.total);
      request.onerror = request.onabort = () => reject(lost());
      request.onload = () => {
        try {
          const { status, responseText } = request;
          if (status < 200 || status >= 300) throw errorOf(status, responseText, request.getResponseHeader("Retry-After"));
          resolve(JSON.parse(responseText));
        } catch (error) {
          reject(error instanceof ApiError ? this.#refused(error) : lost());
        }
      };
      request.send(form);
    });
  }

  /** How many tokens these messages are behind the chat template. */
  async countTokens(model, messages, signal) {
    return (await this.#json("v1/chat/completions/input_tokens", { method: "POST", json: { model, messages }, signal })).input_tokens;
  }

  /** The chunks of a streamed answer. Ends without error only if the server said that it is whole. */
  async *chat(request, signal) {
    const silence = new AbortController();
    const either = AbortSignal.any([signal, silence.signal]);
    const options = { stream: true, stream_options: { include_usage: true }, return_progress: true, sse_ping_interval: PING_S };
    try {
      const response = await this.#send("v1/chat/completions", { method: "POST", json: { ...request, ...options }, signal: either });
      for await (const data of eventData(response.body, () => silence.abort())) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, { status: 500, code: chunk.error.code, details: chunk.error });
        yield chunk;
      }
      throw lost();
    } catch (error) {
      if (error instanceof ApiError || signal.aborted) throw error;
      throw lost();
    }
  }
}

/** The data of server-sent events. onSilence is called if nothing, not even a comment, came for too long. */
async function* eventData(body, onSilence) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const timer = setTimeout(onSilence, SILENCE_MS);
      const { done, value } = await reader.read().finally(() => clearTimeout(timer));
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
