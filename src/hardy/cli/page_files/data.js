"use strict";
/* Numbers of curves: unpacking, smoothing, finding, and choosing what a screen can show. No drawing. */

const SHOWN_POINTS = 2000;

/* Undo hardy.cli.page_curves.encode: differences of neighbours, "_" for a gap, "d*n" for n times d. */
function decode(packed) {
  const values = [];
  if (packed.steps === "") return values;
  const unit = 10 ** packed.decimals;
  let sum = 0;
  for (const item of packed.steps.split(",")) {
    const [word, times] = item.split("*");
    for (let left = times === undefined ? 1 : Number(times); left > 0; left--) {
      if (word === "_") {
        values.push(null);
      } else {
        sum += Number(word);
        values.push(sum / unit);
      }
    }
  }
  return values;
}

/* Exponential average with bias correction; gaps stay. `weight` is what a point keeps of those before it. */
function smoothed(values, weight) {
  if (weight === 0) return values;
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

/* First index whose place is at least `x`; places rise. */
function firstAtLeast(places, x) {
  let low = 0;
  let high = places.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (places[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

/* Indices [from, to) of the points within [left, right], and one more on either side. */
function within(places, left, right) {
  const from = Math.max(0, firstAtLeast(places, left) - 1);
  let to = firstAtLeast(places, right);
  while (to < places.length && places[to] === right) to++;
  return [from, Math.min(places.length, to + 1)];
}

/* Of the points [from, to): at most about SHOWN_POINTS, the lowest and the highest of each stretch. */
function chosen(values, from, to) {
  const count = to - from;
  const indices = [];
  if (count <= SHOWN_POINTS) {
    for (let i = from; i < to; i++) indices.push(i);
    return indices;
  }
  const buckets = SHOWN_POINTS / 2;
  for (let bucket = 0; bucket < buckets; bucket++) {
    const start = from + Math.floor((bucket * count) / buckets);
    const end = from + Math.floor(((bucket + 1) * count) / buckets);
    let low = -1;
    let high = -1;
    for (let i = start; i < end; i++) {
      if (values[i] === null) continue;
      if (low < 0 || values[i] < values[low]) low = i;
      if (high < 0 || values[i] > values[high]) high = i;
    }
    if (low < 0) indices.push(start);
    else if (low === high) indices.push(low);
    else indices.push(Math.min(low, high), Math.max(low, high));
  }
  return indices;
}

/* Index of the point nearest to `x` that is no gap; -1 where there is none. */
function nearest(places, values, x) {
  const at = firstAtLeast(places, x);
  let right = at;
  while (right < places.length && values[right] === null) right++;
  let left = at - 1;
  while (left >= 0 && values[left] === null) left--;
  if (left < 0) return right < places.length ? right : -1;
  if (right >= places.length) return left;
  return x - places[left] <= places[right] - x ? left : right;
}

/* About `count` round numbers between low and high. */
function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(i * step);
  return ticks;
}

/* Powers of ten, with 2 and 5 where there is room; round numbers where the span is small. */
function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 1) return linearTicks(low, high, count).filter((tick) => tick > 0);
  const every = Math.max(1, Math.ceil(decades / count));
  const factors = decades * 3 <= count * 1.5 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    if (power % every !== 0) continue;
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks;
}

/* A number for people: 4 figures, or as many as tell neighbours `step` apart; k, M, G for large ones. */
function shown(value, step) {
  const size = Math.max(Math.abs(value), step || 0);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    const factor = letter === "k" ? 1e3 : unit;
    if (size >= unit) return `${trimmed(value / factor, step ? step / factor : undefined)}${letter}`;
  }
  return trimmed(value, step);
}

function trimmed(value, step) {
  if (value === 0) return "0";
  if (step === undefined) return String(Number(value.toPrecision(4)));
  if (step < 1e-4) return Number(value.toPrecision(3)).toExponential();
  const decimals = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9)));
  return value.toFixed(decimals);
}
