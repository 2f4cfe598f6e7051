// From what a person drops or chooses to a list of files worth sending, and of those that are not, with the reason.

const SKIPPED_FOLDERS = new Set(["node_modules", "__pycache__", "site-packages", "dist-packages"]);
// Formats with zeros in them that the server reads all the same.
const DOCUMENTS = /\.(pdf|epub|docx|zip)$/i;
const SNIFFED_BYTES = 8192;
const MOST_FILES = 5000;

/** What was taken: files as {file, name}, name with its path below the dropped folder; skipped as {name, reason}. */
class Intake {
  files = [];
  skipped = [];

  get full() {
    return this.files.length >= MOST_FILES;
  }

  skip(name, reason) {
    this.skipped.push({ name, reason });
  }

  async take(file, name) {
    if (this.full) this.skip(name, `after the first ${MOST_FILES.toLocaleString("en")} files`);
    else if (file.size === 0) this.skip(name, "empty");
    else if (!(await readable(file))) this.skip(name, "not text");
    else this.files.push({ file, name });
  }
}

/** Why an entry of a folder is not even looked at, or null. */
function unwanted(name, isFolder) {
  if (name.startsWith(".")) return "hidden";
  return isFolder && SKIPPED_FOLDERS.has(name) ? "installed packages" : null;
}

/** Whether it is a document, or text by the look of its beginning: UTF-16 with its mark, or no zero byte. */
async function readable(file) {
  if (DOCUMENTS.test(file.name)) return true;
  const head = new Uint8Array(await file.slice(0, SNIFFED_BYTES).arrayBuffer());
  const utf16 = (head[0] === 0xff && head[1] === 0xfe) || (head[0] === 0xfe && head[1] === 0xff);
  return utf16 || !head.includes(0);
}

/** Files chosen one by one or as a folder through an input. */
export async function fromInput(fileList) {
  const intake = new Intake();
  const told = new Set();
  for (const file of fileList) {
    const name = file.webkitRelativePath || file.name;
    const parts = name.split("/");
    // The chosen folder itself is wanted, whatever its name; a file chosen directly too.
    const at = parts.findIndex((part, index) => index > 0 && unwanted(part, index < parts.length - 1) !== null);
    if (at < 0) {
      await take(intake, file, name);
      continue;
    }
    const where = parts.slice(0, at + 1).join("/");
    if (!told.has(where)) intake.skip(where, unwanted(parts[at], at < parts.length - 1));
    told.add(where);
  }
  return intake;
}

/** Files and folders dropped. Must be called while the drop event is handled: the browser forgets the items after it. */
export function fromDrop(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const dropped = items.map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile()).filter(Boolean);
  return (async () => {
    const intake = new Intake();
    for (const each of dropped) await walk(intake, each, "");
    return intake;
  })();
}

async function walk(intake, entry, folder) {
  const name = folder + entry.name;
  if (entry instanceof File) return take(intake, entry, name);
  const reason = folder ? unwanted(entry.name, entry.isDirectory) : null;
  if (reason !== null) return intake.skip(name, reason);
  if (intake.full) return intake.skip(name, `after the first ${MOST_FILES.toLocaleString("en")} files`);
  try {
    if (entry.isFile) return await take(intake, await new Promise((resolve, reject) => entry.file(resolve, reject)), name);
    for (const child of await entries(entry)) await walk(intake, child, `${name}/`);
  } catch {
    intake.skip(name, "cannot be read");
  }
}

async function take(intake, file, name) {
  try {
    await intake.take(file, name);
  } catch {
    intake.skip(name, "cannot be read");
  }
}

/** All entries of a folder, in order. Browsers hand them out about a hundred at a time. */
async function entries(folder) {
  const reader = folder.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return found.sort((a, b) => (a.name < b.name ? -1 : 1));
    found.push(...some);
  }
}
