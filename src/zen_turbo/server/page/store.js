// What survives a reload. Storage may be full, switched off, or hold what an older page wrote: each is told apart from "nothing there" only
// where it matters, and none breaks the page.

const PREFIX = "zen-turbo.";

/** The value, or the fallback if there is none of the fallback's kind. */
export function load(storage, name, fallback) {
  try {
    const text = storage().getItem(PREFIX + name);
    const value = JSON.parse(text);
    const same = value !== null && typeof value === typeof fallback && Array.isArray(value) === Array.isArray(fallback);
    return same ? value : fallback;
  } catch {
    return fallback;
  }
}

/** Gives whether it is kept. null removes. */
export function save(storage, name, value) {
  try {
    if (value === null) storage().removeItem(PREFIX + name);
    else storage().setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// Functions, because where storage is switched off naming it throws.
export const tab = () => sessionStorage;
export const browser = () => localStorage;
