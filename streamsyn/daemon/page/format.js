// Numbers, sizes and times as text. What is not known is a dash.

export const UNKNOWN = "–";

const isKnown = (value) => typeof value === "number" && Number.isFinite(value);

/** A count, such as `12,345`. */
export function count(value) {
  return isKnown(value) ? Math.round(value).toLocaleString("en-US") : UNKNOWN;
}

/** A number that may be small, such as `0.42`, `3.1` or `1,204`. */
export function decimal(value) {
  if (!isKnown(value)) return UNKNOWN;
  if (value === 0) return "0";
  if (Math.abs(value) >= 100) return count(value);
  return value.toFixed(Math.abs(value) >= 10 ? 1 : 2);
}

/** A large count in few characters, such as `12.3 M`. */
export function short(value) {
  if (!isKnown(value)) return UNKNOWN;
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (value >= size) {
      const scaled = value / (unit === "k" ? 1e3 : size);
      return `${scaled.toFixed(scaled >= 100 ? 0 : 1)} ${unit}`;
    }
  }
  return count(value);
}

/** A share from 0 to 1 in per cent. */
export function percent(share) {
  if (!isKnown(share)) return UNKNOWN;
  const value = share * 100;
  return `${value !== 0 && value < 10 ? value.toFixed(1) : Math.round(value)} %`;
}

/** Bytes, such as `1.4 TB`. */
export function bytes(value) {
  if (!isKnown(value)) return UNKNOWN;
  for (const [size, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= size) return `${(value / size).toFixed(value / size >= 100 ? 0 : 1)} ${unit}`;
  }
  return `${count(value)} B`;
}

/** Seconds, such as `2 d 03 h`, `1 h 05 min`, `3 min 20 s` or `12 s`. */
export function duration(seconds) {
  if (!isKnown(seconds)) return UNKNOWN;
  const whole = Math.max(0, Math.round(seconds));
  const pad = (number) => String(number).padStart(2, "0");
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${pad(hours)} h`;
  if (hours) return `${hours} h ${pad(minutes)} min`;
  if (minutes) return `${minutes} min ${pad(whole % 60)} s`;
  return `${whole} s`;
}

/** The time of day of Unix seconds in the reader's time zone; with the date if that is not today. */
export function clock(seconds) {
  if (!isKnown(seconds)) return UNKNOWN;
  const at = new Date(seconds * 1000);
  const pad = (number) => String(number).padStart(2, "0");
  const time = `${pad(at.getHours())}:${pad(at.getMinutes())}:${pad(at.getSeconds())}`;
  if (at.toDateString() === new Date().toDateString()) return time;
  return `${at.getFullYear()}-${pad(at.getMonth() + 1)}-${pad(at.getDate())} ${time}`;
}

/** `1 seed`, `2 seeds`; `plural` where an s does not make it. */
export function counted(number, noun, plural = `${noun}s`) {
  return `${count(number)} ${number === 1 ? noun : plural}`;
}
