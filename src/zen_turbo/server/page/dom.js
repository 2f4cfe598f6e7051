// Building nodes. Text only ever becomes text nodes: nothing in this page parses a string as markup.

/** An element with attributes (true is an empty one, false and null are left out), listeners (on...: function) and children: nodes, texts, and
 * arrays of them, which may be longer than a call can have arguments. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Copies text. Browsers offer the clipboard to secure pages only; elsewhere a selection is copied. Gives whether it worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { class: "visually-hidden", readonly: true });
    const before = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    before?.focus();
    return copied;
  }
}

/** A button that copies what text() gives and says so. */
export function copyButton(label, text) {
  const button = el("button", { type: "button", class: "quiet copy" }, label);
  button.addEventListener("click", async () => {
    button.textContent = (await copyText(text())) ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}
