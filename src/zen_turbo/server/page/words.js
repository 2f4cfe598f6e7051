// Numbers and spans of time as people say them. The page speaks English, so its numbers do too.

const NBSP = "\u00a0"; // between a number and its unit, so that a line does not end there
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (n) => whole.format(n);

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** Share in percent: whole above 10, one decimal below, and never 100 for less than all nor 0 for more than nothing. */
export function percent(part, total) {
  const value = total > 0 ? (100 * part) / total : 0;
  if (value > 0 && value < 0.1) return `under 0.1${NBSP}%`;
  if (value > 0 && value < 10) return `${Number(value.toFixed(1))}${NBSP}%`;
  return `${value < 100 ? Math.min(99, Math.round(value)) : Math.round(value)}${NBSP}%`;
}

/** A fraction in percent with one decimal: for density and recall, where 99.4 and 99.9 differ. */
export const fine = (fraction) => `${(100 * fraction).toFixed(1)}${NBSP}%`;

export function bytes(n) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) {
    n /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? count(n) : n.toFixed(n < 10 ? 2 : 1)}${NBSP}${units[unit]}`;
}

/** A measured span. */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(seconds < 1 ? 2 : 1)}${NBSP}s`;
  const s = Math.round(seconds);
  if (s < 60) return `${s}${NBSP}s`;
  if (s < 3600) return `${Math.floor(s / 60)}${NBSP}min ${s % 60}${NBSP}s`;
  return `${Math.floor(s / 3600)}${NBSP}h ${Math.floor((s % 3600) / 60)}${NBSP}min`;
}

/** An estimate of what is left: no more digits than it deserves. */
export function timeLeft(seconds) {
  if (seconds < 5) return "a few seconds left";
  if (seconds < 57) return `about${NBSP}${5 * Math.ceil(seconds / 5)}${NBSP}s${NBSP}left`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `about${NBSP}${Math.max(1, minutes)}${NBSP}min${NBSP}left`;
  const rounded = 5 * Math.round(minutes / 5);
  const rest = rounded % 60;
  return `about${NBSP}${Math.floor(rounded / 60)}${NBSP}h${rest ? ` ${rest}${NBSP}min` : ""}${NBSP}left`;
}
