/* One picture of curves: what is shown (state), and drawing it as SVG. */

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 6;
const MARGIN = { top: 12, right: 14, bottom: 44, left: 58 };

function make(parent, name, attributes, text) {
  const isSvg = parent.namespaceURI === SVG || name === "svg";
  const element = isSvg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

class Chart {
  constructor(element, data) {
    this.element = element;
    this.axes = data.axes;
    this.title = data.title;
    this.yLabel = data.yLabel;
    this.groups = [...new Set(data.curves.map((curve) => curve.group))];
    this.kinds = [...new Set(data.curves.map((curve) => curve.kind))];
    this.curves = data.curves.map((curve) => this.unpacked(curve));
    this.hasMarks = this.curves.some((curve) => curve.marks.length > 0);
    this.names = new Set(this.curves.map((curve) => curve.name));
    this.shownKinds = new Set(this.kinds.filter((kind) => !data.off.includes(kind)));
    this.showsMarks = true;
    this.axis = this.axes[0];
    this.isLog = false;
    this.smoothing = 0;
    this.zoom = { x: null, y: null };
  }

  unpacked(curve) {
    const x = {};
    for (const [axis, packed] of Object.entries(curve.x)) x[axis] = decode(packed);
    const [low, high] = [curve.low, curve.high].map((packed) => packed && decode(packed));
    const place = this.groups.indexOf(curve.group);
    return { ...curve, x, y: decode(curve.y), low, high, place };
  }

  visible() {
    return this.curves.filter(
      (curve) => this.names.has(curve.name) && this.shownKinds.has(curve.kind) && curve.x[this.axis],
    );
  }

  /* The values of a curve as they are drawn: smoothed, and on a logarithmic axis only what is above zero. */
  values(curve) {
    const key = `${this.smoothing} ${this.isLog}`;
    if (curve.key !== key) {
      curve.key = key;
      curve.raw = this.drawable(curve.y);
      curve.now = this.isSmoothed(curve) ? this.drawable(smoothed(curve.y, this.smoothing)) : curve.raw;
      curve.bandLow = curve.low && this.drawable(curve.low);
      curve.bandHigh = curve.high && this.drawable(curve.high);
    }
    return curve.now;
  }

  isSmoothed(curve) {
    return curve.style === "line" && !curve.low && this.smoothing > 0; // a mean has few points already
  }

  drawable(values) {
    return this.isLog ? values.map((value) => (value !== null && value > 0 ? value : null)) : values;
  }

  /* The whole span of the x axis, whatever the zoom; of all curves, so that it stays while some are hidden. */
  fullX() {
    let [low, high] = [Infinity, -Infinity];
    for (const curve of this.curves) {
      const places = curve.x[this.axis];
      if (!places || places.length === 0) continue;
      low = Math.min(low, places[0]);
      high = Math.max(high, places[places.length - 1]);
    }
    if (low > high) return [0, 1];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }

  rangeX() {
    return this.zoom.x || this.fullX();
  }

  /* From the curves alone: a band of two runs is so wide that it would flatten them. */
  rangeY() {
    if (this.zoom.y) return this.zoom.y;
    const [left, right] = this.rangeX();
    let [low, high] = [Infinity, -Infinity];
    for (const curve of this.visible()) {
      const values = this.values(curve);
      const places = curve.x[this.axis];
      const [from, to] = within(places, left, right);
      for (let i = from; i < to; i++) {
        if (values[i] === null || places[i] < left || places[i] > right) continue;
        low = Math.min(low, values[i]);
        high = Math.max(high, values[i]);
      }
    }
    if (low > high) return this.isLog ? [0.1, 10] : [0, 1];
    if (low === high) return this.isLog ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
    if (this.isLog) return [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
    const edge = (high - low) * 0.04;
    return [low - edge, high + edge];
  }

  /* Functions between numbers and pixels, fixed while one picture stands. */
  scales() {
    const width = Math.max(240, this.element.clientWidth);
    const height = width < 520 ? 300 : 420;
    const [left, right] = this.rangeX();
    const [low, high] = this.rangeY();
    const [inner, tall] = [width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom];
    const level = this.isLog ? Math.log : (value) => value;
    const raise = this.isLog ? Math.exp : (value) => value;
    return {
      width, height, left, right, low, high, inner, tall,
      x: (value) => MARGIN.left + ((value - left) / (right - left)) * inner,
      y: (value) => MARGIN.top + ((level(high) - level(value)) / (level(high) - level(low))) * tall,
      valueX: (pixel) => left + ((pixel - MARGIN.left) / inner) * (right - left),
      valueY: (pixel) => raise(level(high) - ((pixel - MARGIN.top) / tall) * (level(high) - level(low))),
    };
  }

  draw() {
    const to = (this.scale = this.scales());
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${to.width} ${to.height}`);
    this.svg.setAttribute("height", to.height);
    this.svg.setAttribute("aria-label", this.described());
    const clip = make(make(this.svg, "clipPath", { id: this.clip }), "rect", {});
    const box = { x: MARGIN.left, y: MARGIN.top, width: to.inner, height: to.tall };
    for (const [key, value] of Object.entries(box)) clip.setAttribute(key, value);
    this.drawAxes(to);
    const plot = make(this.svg, "g", { "clip-path": `url(#${this.clip})` });
    const curves = this.visible();
    for (const curve of curves) this.drawBand(plot, curve, to);
    for (const curve of curves) this.drawCurve(plot, curve, to);
    if (this.showsMarks) for (const curve of curves) this.drawMarks(plot, curve, to);
    this.cross = make(plot, "g", { class: "cross" });
    this.selection = make(plot, "rect", { class: "selection", hidden: "" });
    if (curves.length === 0) {
      const middle = { x: to.width / 2, y: to.height / 2, class: "empty" };
      make(this.svg, "text", middle, "Nothing is shown: all curves are switched off.");
    }
  }

  described() {
    const [left, right] = this.rangeX();
    const curves = this.visible().length;
    return `${this.title}: ${this.yLabel} against ${this.axis}, ${shown(left)} to ${shown(right)}; ${curves} curves`;
  }

  drawAxes(to) {
    const group = make(this.svg, "g", { class: "axes" });
    const ticksX = linearTicks(to.left, to.right, Math.max(3, to.inner / 90));
    const stepX = ticksX.length > 1 ? ticksX[1] - ticksX[0] : undefined;
    const bottom = MARGIN.top + to.tall;
    for (const tick of ticksX) {
      const x = to.x(tick);
      make(group, "line", { x1: x, x2: x, y1: MARGIN.top, y2: bottom });
      make(group, "text", { x, y: bottom + 16, class: "below" }, shown(tick, stepX));
    }
    const ticksY = (this.isLog ? logTicks : linearTicks)(to.low, to.high, Math.max(3, to.tall / 55));
    const stepY = ticksY.length > 1 ? ticksY[1] - ticksY[0] : undefined;
    for (const tick of ticksY) {
      const y = to.y(tick);
      make(group, "line", { x1: MARGIN.left, x2: MARGIN.left + to.inner, y1: y, y2: y });
      make(group, "text", { x: MARGIN.left - 7, y: y + 4, class: "beside" }, shown(tick, this.isLog ? tick : stepY));
    }
    make(group, "rect", { x: MARGIN.left, y: MARGIN.top, width: to.inner, height: to.tall, class: "frame" });
    const middle = MARGIN.left + to.inner / 2;
    make(group, "text", { x: middle, y: to.height - 6, class: "below label" }, this.axis);
    const turn = `translate(13 ${MARGIN.top + to.tall / 2}) rotate(-90)`;
    make(group, "text", { transform: turn, class: "below label" }, this.yLabel);
  }

  /* A path through some points; a gap begins a new piece. */
  path(curve, values, to) {
    const places = curve.x[this.axis];
    const [from, end] = within(places, to.left, to.right);
    let text = "";
    let isDown = false;
    for (const i of chosen(values, from, end)) {
      if (values[i] === null) {
        isDown = false;
      } else {
        text += `${isDown ? "L" : "M"}${to.x(places[i]).toFixed(1)} ${to.y(values[i]).toFixed(1)}`;
        isDown = true;
      }
    }
    return text;
  }

  look(curve) {
    return `c${curve.place % COLOURS} dash${Math.floor(curve.place / COLOURS) % 4}`;
  }

  drawBand(plot, curve, to) {
    if (!curve.low) return;
    this.values(curve);
    const places = curve.x[this.axis];
    const [from, end] = within(places, to.left, to.right);
    const [under, over] = [[], []];
    const flush = () => {
      if (over.length > 1) {
        const d = `M${[...over, ...under.reverse()].join("L")}Z`;
        make(plot, "path", { d, class: `band ${this.look(curve)}` });
      }
      under.length = over.length = 0;
    };
    for (let i = from; i < end; i++) {
      if (curve.bandHigh[i] === null) {
        flush();
        continue;
      }
      const x = to.x(places[i]).toFixed(1);
      const low = curve.bandLow[i] === null ? to.low : curve.bandLow[i]; // below zero on a logarithmic axis
      over.push(`${x} ${to.y(curve.bandHigh[i]).toFixed(1)}`);
      under.push(`${x} ${to.y(low).toFixed(1)}`);
    }
    flush();
  }

  drawCurve(plot, curve, to) {
    const values = this.values(curve);
    const about = { "data-name": curve.name, "data-kind": curve.kind };
    if (this.isSmoothed(curve)) {
      make(plot, "path", { d: this.path(curve, curve.raw, to), class: `raw ${this.look(curve)}` });
    }
    const kind = curve.low ? "mean" : curve.style;
    make(plot, "path", { ...about, d: this.path(curve, values, to), class: `curve ${kind} ${this.look(curve)}` });
    if (curve.style !== "dots") return;
    const places = curve.x[this.axis];
    const [from, end] = within(places, to.left, to.right);
    if (end - from > 60) return;
    for (let i = from; i < end; i++) {
      if (values[i] === null) continue;
      const centre = { cx: to.x(places[i]).toFixed(1), cy: to.y(values[i]).toFixed(1), r: 3 };
      make(plot, "circle", { ...centre, class: `dot ${this.look(curve)}` });
    }
  }

  drawMarks(plot, curve, to) {
    const values = this.values(curve);
    for (const mark of curve.marks) {
      const place = mark.x[this.axis];
      const at = place === undefined ? -1 : nearest(curve.x[this.axis], values, place);
      if (at < 0) continue;
      const [x, y] = [to.x(place), to.y(values[at])];
      const d = `M${x.toFixed(1)} ${(y - 3).toFixed(1)}l-5.5 -10h11z`;
      const triangle = make(plot, "path", { d, class: `mark ${this.look(curve)}` });
      make(triangle, "title", {}, `${curve.name}: ${mark.text}`);
    }
  }
}
