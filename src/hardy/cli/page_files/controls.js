/* What a reader can do with a picture: switches, zoom by drag, wheel and keys, and a box of values. */

let numCharts = 0;

function build(element) {
  const chart = new Chart(element, JSON.parse(document.getElementById(element.dataset.from).textContent));
  const longest = Math.max(0, ...chart.curves.filter((c) => c.style === "line" && !c.low).map((c) => c.y.length));
  chart.smoothing = longest >= 300 ? 0.9 : 0;
  addControls(chart);
  addLegend(chart);
  chart.stage = make(element, "div", { class: "stage" });
  chart.clip = `clip-${++numCharts}`;
  chart.svg = make(chart.stage, "svg", { role: "img", tabindex: "0", width: "100%" });
  chart.box = make(chart.stage, "div", { class: "values", hidden: "" });
  const keys = "Drag to zoom in, or turn the wheel; with the keyboard: + and - zoom, arrows move, 0 shows the whole range.";
  make(element, "p", { class: "hint" }, keys);
  addPointer(chart);
  addKeys(chart);
  chart.draw();
  let width = element.clientWidth;
  new ResizeObserver(() => {
    if (element.clientWidth !== width) {
      width = element.clientWidth;
      chart.draw();
    }
  }).observe(element);
}

function addControls(chart) {
  const bar = make(chart.element, "div", { class: "controls" });
  if (chart.axes.length > 1) {
    const label = make(bar, "label", {}, "x axis ");
    const select = make(label, "select", { class: "axis" });
    for (const axis of chart.axes) make(select, "option", { value: axis }, axis);
    select.addEventListener("change", () => {
      chart.axis = select.value;
      chart.zoom = { x: null, y: null };
      chart.draw();
    });
  }
  addSwitch(bar, "log y axis", false, (isOn) => {
    chart.isLog = isOn;
    chart.zoom.y = null;
  }, chart);
  if (chart.curves.some((curve) => curve.style === "line")) addSlider(bar, chart);
  const reset = make(bar, "button", { type: "button" }, "whole range");
  reset.addEventListener("click", () => zoomTo(chart, null, null));
  if (chart.kinds.length > 1) {
    for (const kind of chart.kinds) {
      addSwitch(bar, kind, chart.shownKinds.has(kind), (isOn) => toggle(chart.shownKinds, kind, isOn), chart);
    }
  }
  if (chart.hasMarks) addSwitch(bar, "▾ anomalies", true, (isOn) => (chart.showsMarks = isOn), chart);
}

function addSlider(bar, chart) {
  const label = make(bar, "label", {}, "smoothing ");
  const about = { type: "range", min: "0", max: "0.99", step: "0.01", value: chart.smoothing, class: "smoothing" };
  const slider = make(label, "input", about);
  const output = make(label, "output", {}, chart.smoothing.toFixed(2));
  slider.addEventListener("input", () => {
    chart.smoothing = Number(slider.value);
    output.textContent = chart.smoothing.toFixed(2);
    chart.draw();
  });
}

function addSwitch(parent, text, isOn, act, chart) {
  const button = make(parent, "button", { type: "button", "aria-pressed": String(isOn) }, text);
  button.addEventListener("click", () => {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(now));
    act(now);
    chart.draw();
  });
  return button;
}

function toggle(set, value, isIn) {
  if (isIn) set.add(value);
  else set.delete(value);
}

/* A button for each group; where a group has several names, one for each of them behind it. */
function addLegend(chart) {
  const legend = make(chart.element, "div", { class: "legend", role: "group", "aria-label": "curves" });
  const buttons = [];
  const refresh = () => {
    for (const [button, names] of buttons) {
      button.setAttribute("aria-pressed", String(names.some((name) => chart.names.has(name))));
    }
    chart.draw();
  };
  const add = (names, text, look, kind) => {
    const button = make(legend, "button", { type: "button", class: kind, "aria-pressed": "true" });
    if (look) {
      const sample = make(button, "svg", { width: 26, height: 10, "aria-hidden": "true" });
      make(sample, "path", { d: "M1 5H25", class: `curve ${look}` });
    }
    make(button, "span", {}, text);
    buttons.push([button, names]);
    button.addEventListener("click", () => {
      const isOn = names.some((name) => chart.names.has(name));
      for (const name of names) toggle(chart.names, name, !isOn);
      refresh();
    });
  };
  for (const group of chart.groups) {
    const curves = chart.curves.filter((curve) => curve.group === group);
    const names = [...new Set(curves.map((curve) => curve.name))];
    add(names, group, chart.look(curves[0]), "group");
    const single = names.filter((name) => name !== group);
    if (names.length > 1) for (const name of single) add([name], name, null, "single");
  }
}

function zoomTo(chart, x, y) {
  const [first, last] = chart.fullX();
  if (x) {
    const span = x[1] - x[0];
    if (!(span > (last - first) * 1e-6)) return;
    x = span >= last - first ? null : [Math.max(first, x[0]), Math.min(last, x[1])];
  }
  chart.zoom = { x, y };
  chart.draw();
}

/* Make the span `factor` times as wide around `centre`, without leaving the whole. */
function scaleX(chart, factor, centre) {
  const [first, last] = chart.fullX();
  const [left, right] = chart.rangeX();
  const span = Math.min(last - first, (right - left) * factor);
  let start = centre - ((centre - left) / (right - left)) * span;
  start = Math.min(Math.max(start, first), last - span);
  zoomTo(chart, [start, start + span], null);
}

function moveX(chart, share) {
  const [first, last] = chart.fullX();
  const [left, right] = chart.rangeX();
  const start = Math.min(Math.max(left + share * (right - left), first), last - (right - left));
  zoomTo(chart, [start, start + right - left], chart.zoom.y);
}

function addKeys(chart) {
  chart.svg.addEventListener("keydown", (event) => {
    const [left, right] = chart.rangeX();
    const acts = {
      "+": () => scaleX(chart, 0.7, (left + right) / 2),
      "-": () => scaleX(chart, 1 / 0.7, (left + right) / 2),
      ArrowLeft: () => moveX(chart, -0.2),
      ArrowRight: () => moveX(chart, 0.2),
      0: () => zoomTo(chart, null, null),
      Escape: () => zoomTo(chart, null, null),
    };
    acts["="] = acts["+"];
    if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    acts[event.key]();
  });
}

function addPointer(chart) {
  let start = null;
  const place = (event) => {
    const frame = chart.svg.getBoundingClientRect();
    const inside = (value, low, high) => Math.min(Math.max(value, low), high);
    const { inner, tall } = chart.scale;
    const x = inside(event.clientX - frame.left, MARGIN.left, MARGIN.left + inner);
    return [x, inside(event.clientY - frame.top, MARGIN.top, MARGIN.top + tall)];
  };
  chart.svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = place(event);
    chart.svg.setPointerCapture(event.pointerId);
  });
  chart.svg.addEventListener("pointermove", (event) => {
    if (start) select(chart, start, place(event));
    else showValues(chart, place(event));
  });
  chart.svg.addEventListener("pointerup", (event) => {
    if (!start) return;
    const [from, to] = [start, place(event)];
    start = null;
    chart.selection.setAttribute("hidden", "");
    if (Math.abs(to[0] - from[0]) < 6) {
      showValues(chart, to);
      return;
    }
    const { valueX, valueY } = chart.scale;
    const x = [valueX(Math.min(from[0], to[0])), valueX(Math.max(from[0], to[0]))];
    const isBox = Math.abs(to[1] - from[1]) > 30;
    const y = isBox ? [valueY(Math.max(from[1], to[1])), valueY(Math.min(from[1], to[1]))] : chart.zoom.y;
    hideValues(chart);
    zoomTo(chart, x, y);
  });
  chart.svg.addEventListener("pointercancel", () => {
    start = null;
    chart.selection.setAttribute("hidden", "");
  });
  chart.svg.addEventListener("pointerleave", () => hideValues(chart));
  chart.svg.addEventListener("dblclick", () => zoomTo(chart, null, null));
  chart.svg.addEventListener("wheel", (event) => {
    const isOut = event.deltaY > 0;
    if (event.deltaY === 0 || (isOut && !chart.zoom.x)) return; // let the page go on
    event.preventDefault();
    scaleX(chart, isOut ? 1.25 : 0.8, chart.scale.valueX(place(event)[0]));
  }, { passive: false });
}

function select(chart, from, to) {
  hideValues(chart);
  const isBox = Math.abs(to[1] - from[1]) > 30;
  const box = {
    x: Math.min(from[0], to[0]),
    y: isBox ? Math.min(from[1], to[1]) : MARGIN.top,
    width: Math.abs(to[0] - from[0]),
    height: isBox ? Math.abs(to[1] - from[1]) : chart.scale.tall,
  };
  for (const [key, value] of Object.entries(box)) chart.selection.setAttribute(key, value);
  chart.selection.removeAttribute("hidden");
}

const MOST_VALUES = 10;

/* Show the nearest value of each curve in a box beside the pointer. */
function showValues(chart, [pixelX, pixelY]) {
  const to = chart.scale;
  const at = to.valueX(pixelX);
  const found = [];
  for (const curve of chart.visible()) {
    const [places, values] = [curve.x[chart.axis], chart.values(curve)];
    const index = nearest(places, values, at);
    if (index < 0 || at < places[0] - (to.right - to.left) / 50) continue;
    if (at > places[places.length - 1] + (to.right - to.left) / 50) continue;
    if (places[index] < to.left || places[index] > to.right) continue;
    found.push({ curve, index, x: places[index], y: values[index] });
  }
  chart.cross.replaceChildren();
  chart.box.replaceChildren();
  chart.box.hidden = found.length === 0;
  if (found.length === 0) return;
  const line = { x1: pixelX, x2: pixelX, y1: MARGIN.top, y2: MARGIN.top + to.tall };
  make(chart.cross, "line", line);
  const closest = found.reduce((a, b) => (Math.abs(b.x - at) < Math.abs(a.x - at) ? b : a));
  make(chart.box, "p", {}, `${chart.axis} ${closest.x.toLocaleString("en", { maximumFractionDigits: 1 })}`);
  const list = make(chart.box, "ul", {});
  found.sort((a, b) => Math.abs(to.y(a.y) - pixelY) - Math.abs(to.y(b.y) - pixelY));
  const near = found.slice(0, MOST_VALUES).sort((a, b) => b.y - a.y);
  for (const { curve, index, x, y } of near) {
    make(chart.cross, "circle", { cx: to.x(x), cy: to.y(y), r: 3.5, class: chart.look(curve) });
    const item = make(list, "li", {});
    make(item, "i", { class: `swatch ${chart.look(curve)}` });
    const range = curve.low && curve.low[index] !== null && curve.low[index] !== undefined
      ? ` (${shown(curve.low[index])} to ${shown(curve.high[index])})` : "";
    make(item, "span", {}, `${curve.name}, ${curve.kind}`);
    make(item, "b", {}, shown(y) + range);
  }
  if (found.length > near.length) make(list, "li", {}, `and ${found.length - near.length} more`);
  const isRight = pixelX > to.width / 2;
  chart.box.style.left = isRight ? "" : `${pixelX + 14}px`;
  chart.box.style.right = isRight ? `${to.width - pixelX + 14}px` : "";
  chart.box.style.top = `${MARGIN.top + 4}px`;
}

function hideValues(chart) {
  chart.box.hidden = true;
  chart.cross.replaceChildren();
}

for (const element of document.querySelectorAll(".chart")) build(element);
