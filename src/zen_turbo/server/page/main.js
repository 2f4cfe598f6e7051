// The page comes to life: the server is found, documents and conversation are shown, and what a person does reaches them.

import { Server } from "./api.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { Documents } from "./documents.js";
import { byId } from "./dom.js";
import { explain } from "./explain.js";
import { fromDrop, fromInput } from "./intake.js";
import { browser, load, save, tab } from "./store.js";
import { count } from "./words.js";

const RETRY_MS = 2000;

const server = new Server(load(tab, "key", ""), askForKey);
let model = null;

// Words for those who do not see the page change. Emptied first, so that the same words are said again.
function say(text) {
  byId("announce").textContent = "";
  requestAnimationFrame(() => (byId("announce").textContent = text));
}

// Reading may take long enough to look at something else meanwhile.
function title(text) {
  document.title = text ? `${text} · zen-turbo` : "zen-turbo";
}
document.addEventListener("visibilitychange", () => document.hidden || conversation.running || title(""));

function confirmed(question, action) {
  const dialog = byId("confirm");
  byId("confirm-question").textContent = question;
  byId("confirm-yes").textContent = action;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

// Documents

const documents = new Documents(
  server,
  { list: byId("document-list"), sum: byId("documents-sum"), share: byId("share"), skipped: byId("skipped"), fallbackFocus: byId("add-files") },
  say,
  confirmed,
);

for (const [button, input] of [
  ["add-files", "files"],
  ["add-folder", "folder"],
  ["start-files", "files"],
  ["start-folder", "folder"],
]) {
  byId(button).addEventListener("click", () => byId(input).click());
}
for (const id of ["files", "folder"]) {
  byId(id).addEventListener("change", async (event) => {
    const chosen = [...event.target.files];
    event.target.value = ""; // so that the same file can be chosen again
    documents.add(await fromInput(chosen));
  });
}
if (!("webkitdirectory" in byId("folder"))) for (const id of ["add-folder", "start-folder"]) byId(id).hidden = true;

// A file that is dropped where nobody takes it replaces the page, so all are taken; what cannot be sent is said.
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
const dropping = (on) => document.body.classList.toggle("dropping", on);
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  event.dataTransfer.dropEffect = filesSupported ? "copy" : "none";
  dropping(filesSupported);
});
addEventListener("dragleave", (event) => event.relatedTarget === null && dropping(false)); // out of the window
addEventListener("drop", async (event) => {
  dropping(false);
  if (!carriesFiles(event)) return;
  event.preventDefault();
  if (filesSupported) documents.add(await fromDrop(event.dataTransfer));
  else say(byId("no-files").textContent);
});

addEventListener("beforeunload", (event) => documents.busy && event.preventDefault());

byId("documents-toggle").addEventListener("click", () => {
  const open = document.body.classList.toggle("documents-open");
  byId("documents-toggle").setAttribute("aria-expanded", String(open));
  byId("documents-toggle").textContent = open ? "Hide" : "Show";
});

byId("settings-toggle").addEventListener("click", () => {
  byId("settings").hidden = !byId("settings").hidden;
  byId("settings-toggle").setAttribute("aria-expanded", String(!byId("settings").hidden));
});

// Conversation

const conversation = new Conversation(
  server,
  { list: byId("turns"), notKept: byId("not-kept") },
  {
    documents,
    model: () => model?.name ?? null,
    sampling: () => composer.sampling,
    say,
    title,
    onAgain: () => byId("stop").focus(),
    onChange: () => {
      composer.running = conversation.running;
      showParts();
      composer.recount();
    },
    onUnauthorised: (question) => (composer.text = composer.text || question),
  },
);

const composer = new Composer(
  {
    form: byId("composer"),
    question: byId("question"),
    ask: byId("ask"),
    stop: byId("stop"),
    total: byId("total"),
    temperature: byId("temperature"),
    longest: byId("longest"),
  },
  {
    onAsk: (text) => {
      if (conversation.running) say("An answer is under way. Stop it first, or wait.");
      return conversation.ask(text);
    },
    onStop: () => conversation.stop(),
    countTokens: async (text, signal) => {
      const messages = conversation.messages(text, { withDocuments: false });
      return model && messages.length ? server.countTokens(model.name, messages, signal) : 0;
    },
    documents,
    say,
  },
);
documents.addEventListener("change", showParts);

function showParts() {
  byId("start").hidden = !conversation.empty;
  byId("start-add").hidden = !documents.empty || !filesSupported;
  byId("start-ask").hidden = documents.empty;
  byId("below").hidden = conversation.empty;
}

byId("clear").addEventListener("click", async () => {
  if (!(await confirmed("Start a new conversation? Documents stay, questions and answers go.", "Start anew"))) return;
  conversation.clear();
  composer.focus();
});

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]") || !conversation.running) return;
  event.preventDefault();
  conversation.stop();
});

addEventListener("pagehide", () => (documents.keep(), conversation.leave()));
addEventListener("pageshow", () => conversation.comeBack());

byId("about-numbers").addEventListener("click", () => byId("numbers").showModal());

// Theme: a choice that is the system's own is no choice, so that the page goes on following the system.

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";

function showTheme() {
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", isDark() ? "Use the light theme" : "Use the dark theme");
}

byId("theme").addEventListener("click", () => {
  const wanted = isDark() ? "light" : "dark";
  const own = wanted !== (systemDark.matches ? "dark" : "light");
  if (own) document.documentElement.dataset.theme = wanted;
  else delete document.documentElement.dataset.theme;
  save(browser, "theme", own ? wanted : null);
  showTheme();
});
systemDark.addEventListener("change", showTheme);
showTheme();

// The server

function askForKey() {
  const form = byId("key-form");
  byId("key-wrong").hidden = !server.key;
  if (!form.hidden) return;
  form.hidden = false;
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  server.key = byId("key").value.trim();
  save(tab, "key", server.key || null);
  byId("key").value = "";
  connect();
});

byId("forget-key").addEventListener("click", () => {
  server.key = "";
  save(tab, "key", null);
  connect();
});

let filesSupported = true;
let connecting = 0;

/** Until the server answers: what it serves, then the documents it has. */
async function connect() {
  const mine = (connecting += 1);
  while (mine === connecting) {
    try {
      const found = await server.model();
      await loadDocuments();
      if (mine === connecting) ready(found);
      return;
    } catch (error) {
      if (mine !== connecting) return;
      if (error.status === 401) return showState("Waiting for an API key");
      const loading = error.code === "loading";
      showState(loading ? "The model is being loaded. This page will be ready when it is." : `${explain(error).title}. Trying again.`);
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

async function loadDocuments() {
  try {
    await documents.refresh();
    filesSupported = true;
  } catch (error) {
    if (error.status !== 404) throw error;
    filesSupported = false; // a server that keeps no files still answers questions
  }
  byId("no-files").hidden = filesSupported;
  for (const id of ["add-files", "add-folder"]) byId(id).disabled = !filesSupported;
}

function ready(found) {
  const first = model === null;
  model = found;
  documents.limit = composer.limit = found.limit;
  showState(found.name, `${count(found.limit)} tokens`);
  byId("limit").textContent = count(found.limit);
  byId("ask").disabled = false;
  const hadForm = !byId("key-form").hidden;
  byId("key-form").hidden = true;
  byId("forget-key").hidden = !server.key;
  if (hadForm || (first && !matchMedia("(pointer: coarse)").matches)) composer.focus();
  showParts();
}

function showState(text, more = "") {
  byId("model").textContent = text;
  byId("context").textContent = more;
}

showParts();
connect();
