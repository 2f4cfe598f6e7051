// Runs before the first paint, so that a chosen theme does not flash. The button is in main.js.
"use strict";
try {
  const theme = JSON.parse(localStorage.getItem("zen-turbo.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is switched off, or holds something else: the system's theme it is.
}
