// Drawing motion on the picture, stroke by stroke: an arrow, a pin (an arrow of no length), and where the model takes a
// mask, a brush for what may move. Beneath lies the field that they make, as the server computes it
// (cinemo/media/, dense_field with its defaults).

import { announce, byId, make } from "./dom.js";

const SIGMA_AT_512 = 170;
const THRESHOLD = 0.05; // of the largest weight
const COLUMNS = 24; // of the field that is shown
const PIN = 0.012; // of the board's width: a shorter stroke is a click
const KEY_STEP = 0.02; // of the board's width for a press of a cursor key
const BRUSH = 0.07;
const MASK_WIDTH = 384;

export class DrawingField {
  strokes = []; // [x0, y0, x1, y1], 0..1 of what the model sees
  painted = false;
  start = null; // of an arrow that is being drawn
  cursor = { x: 0.5, y: 0.5 };

  // control: as in schema.Control; mask: the name of the picture that says what may move, or undefined.
  constructor(control, mask) {
    this.control = control;
    this.maskName = mask;
    this.image = new Image();
    this.mask = document.createElement("canvas");
    this.canvas = make("canvas", { id: control.name, tabIndex: 0, className: "board", role: "application" });
    this.canvas.setAttribute("aria-label", "Draw motion on the picture. Cursor keys move, Enter starts and ends an arrow, "
      + "Escape leaves it, Backspace takes the last one back.");
    this.canvas.setAttribute("aria-describedby", `${control.name}-note ${control.name}-error`);
    this.said = make("span", { className: "note", role: "status" });
    this.brush = mask ? this.button("Brush", "What may move: paint it", () => this.toggleBrush()) : null;
    this.brush?.setAttribute("aria-pressed", "false");
    const tools = make("div", { className: "tools" }, this.brush,
      this.button("Undo", "Take the last one back", () => this.undo()),
      this.button("Clear", "Take all back", () => this.clear()), this.said);
    const about = `Drag to draw where something goes, as far as it goes; click to hold a place still. ${mask ? "With the brush, paint what may move." : ""}`;
    this.root = make("div", { className: "field drawing" },
      make("label", { for: control.name }, control.title), this.canvas, tools,
      make("p", { id: `${control.name}-note`, className: "note" }, about),
      make("p", { id: `${control.name}-error`, className: "error", hidden: true }));
    this.listen();
    this.image.addEventListener("load", () => {
      if (this.wanted) this.value = this.wanted;
      this.show();
    });
    this.take(byId("picture-preview").src);
    document.addEventListener("picture", ({ detail }) => this.take(detail));
    new ResizeObserver(() => this.show()).observe(this.canvas);
    this.show();
  }

  button(text, title, act) {
    const button = make("button", { type: "button", className: "button", title }, text);
    button.addEventListener("click", act);
    return button;
  }

  // Another picture: strokes stay where they are in what the model sees.
  take(address) {
    if (address) this.image.src = address;
  }

  // In the form: pixels of the picture as it was given.
  get value() {
    if (!this.image.naturalWidth) return "";
    return this.strokes.map((arrow) => this.given(arrow).map((each) => each.toFixed(1)).join(",")).join(";");
  }

  // Those of another picture that would begin outside this one are left out.
  set value(strokes) {
    this.wanted = typeof strokes === "string" ? strokes.split(";").filter(Boolean).map((row) => row.split(",").map(Number)) : strokes;
    if (!this.image.naturalWidth) return; // until it is there
    const within = ([x, y]) => x >= 0 && x <= 1 && y >= 0 && y <= 1;
    this.strokes = this.wanted.map((arrow) => this.seen(arrow)).filter(within);
    this.wanted = null;
    this.show();
  }

  // The picture of what may move, where something was painted.
  async maskFile() {
    if (!this.painted || !this.image.naturalWidth) return null;
    const canvas = document.createElement("canvas"); // in the given picture's frame, which is cropped like it
    const { left, top } = this.crop;
    canvas.width = this.image.naturalWidth;
    canvas.height = this.image.naturalHeight;
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.mask, left, top, canvas.width - 2 * left, canvas.height - 2 * top);
    const content = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    return new File([content], "mask.png", { type: "image/png" });
  }

  // What may move, as an earlier video had it; null: nothing is painted.
  async takeMask(file) {
    this.wipe();
    if (!file) return this.show();
    const picture = await createImageBitmap(file);
    this.beginMask();
    const { width, height } = this.mask;
    const scale = Math.max(width / picture.width, height / picture.height); // until it covers what the model sees
    const context = this.mask.getContext("2d");
    const [wide, high] = [picture.width * scale, picture.height * scale];
    context.drawImage(picture, (width - wide) / 2, (height - high) / 2, wide, high);
    const pixels = context.getImageData(0, 0, width, height);
    for (let at = 0; at < pixels.data.length; at += 4) {
      pixels.data[at + 3] = pixels.data[at];
      pixels.data.fill(255, at, at + 3);
    }
    context.putImageData(pixels, 0, 0);
    return this.show();
  }

  beginMask() {
    this.mask.width = MASK_WIDTH;
    this.mask.height = Math.round(MASK_WIDTH / this.crop.shape);
    this.painted = true;
  }

  wipe() {
    this.painted = false;
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
  }

  // How the picture is cut to the model's shape: pixels of it that the board is wide, and its corner.
  get crop() {
    const [width, height] = [this.image.naturalWidth, this.image.naturalHeight];
    const shape = this.canvas.clientWidth / Math.max(1, this.canvas.clientHeight);
    const scale = Math.min(width, height * shape);
    return { scale, left: (width - scale) / 2, top: (height - scale / shape) / 2, shape };
  }

  given([x0, y0, x1, y1]) {
    const { scale, left, top, shape } = this.crop;
    const inside = (x, y) => [left + x * scale, top + (y * scale) / shape];
    return [...inside(x0, y0), ...inside(x1, y1)];
  }

  seen([x0, y0, x1, y1]) {
    const { scale, left, top, shape } = this.crop;
    const inside = (x, y) => [(x - left) / scale, ((y - top) * shape) / scale];
    return [...inside(x0, y0), ...inside(x1, y1)];
  }

  listen() {
    const place = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const within = (share) => Math.min(1, Math.max(0, share));
      return { x: within((event.clientX - box.left) / box.width), y: within((event.clientY - box.top) / box.height) };
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      this.canvas.setPointerCapture(event.pointerId);
      this.cursor = place(event);
      this.start = { ...this.cursor };
      if (this.painting) this.paint(this.cursor);
      this.show();
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!this.start || !this.canvas.hasPointerCapture(event.pointerId)) return;
      this.cursor = place(event);
      if (this.painting) this.paint(this.cursor);
      this.show();
    });
    this.canvas.addEventListener("pointerup", (event) => {
      if (!this.start) return;
      this.cursor = place(event);
      this.end();
    });
    this.canvas.addEventListener("pointercancel", () => this.leave());
    this.canvas.addEventListener("keydown", (event) => {
      const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (event.key in ways) {
        const [x, y] = ways[event.key];
        this.cursor.x = Math.min(1, Math.max(0, this.cursor.x + x * KEY_STEP));
        this.cursor.y = Math.min(1, Math.max(0, this.cursor.y + y * KEY_STEP * this.crop.shape));
        if (this.painting && this.start) this.paint(this.cursor);
      } else if (event.key === "Enter" || event.key === " ") {
        if (this.start) this.end();
        else this.start = { ...this.cursor };
      } else if (event.key === "Escape" && this.start) this.leave();
      else if (event.key === "Backspace") this.undo();
      else return;
      event.preventDefault();
      this.show();
    });
    this.canvas.addEventListener("blur", () => this.show());
    this.canvas.addEventListener("focus", () => this.show());
  }

  end() {
    const { start, cursor } = this;
    this.start = null;
    if (!this.painting) {
      const short = Math.hypot(cursor.x - start.x, (cursor.y - start.y) / this.crop.shape) < PIN;
      this.strokes.push(short ? [start.x, start.y, start.x, start.y] : [start.x, start.y, cursor.x, cursor.y]);
    }
    this.changed();
  }

  leave() {
    this.start = null;
    this.show();
  }

  undo() {
    this.strokes.pop();
    this.changed();
  }

  clear() {
    this.strokes = [];
    this.wipe();
    this.changed();
  }

  changed() {
    this.canvas.dispatchEvent(new Event("input", { bubbles: true }));
    this.show();
    announce(this.said.textContent);
  }

  get painting() {
    return this.brush?.getAttribute("aria-pressed") === "true";
  }

  toggleBrush() {
    this.brush.setAttribute("aria-pressed", String(!this.painting));
    this.leave();
  }

  paint({ x, y }) {
    if (!this.painted) this.beginMask();
    const context = this.mask.getContext("2d");
    context.fillStyle = "#fff";
    context.beginPath();
    context.arc(x * this.mask.width, y * this.mask.height, BRUSH * this.mask.width, 0, 2 * Math.PI);
    context.fill();
  }

  // Words for those who do not see it, and the picture.
  show() {
    const pins = this.strokes.filter(([x0, y0, x1, y1]) => x0 === x1 && y0 === y1).length;
    const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
    this.said.textContent = [count(this.strokes.length - pins, "arrow"), pins ? count(pins, "pin") : "",
      this.painted ? "brush" : ""].filter(Boolean).join(", ");
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (!width || !height) return;
    const dense = window.devicePixelRatio || 1;
    this.canvas.width = width * dense;
    this.canvas.height = height * dense;
    const context = this.canvas.getContext("2d");
    context.scale(dense, dense);
    const { scale, left, top, shape } = this.crop;
    if (this.image.naturalWidth) context.drawImage(this.image, left, top, scale, scale / shape, 0, 0, width, height);
    context.fillStyle = "rgb(10 14 16 / 35%)";
    context.fillRect(0, 0, width, height);
    if (this.painted) {
      context.globalAlpha = 0.35;
      context.drawImage(this.mask, 0, 0, width, height);
      context.globalAlpha = 1;
    }
    const drawn = this.start && !this.painting
      ? [...this.strokes, [this.start.x, this.start.y, this.cursor.x, this.cursor.y]] : this.strokes;
    this.drawField(context, drawn, width, height);
    for (const arrow of drawn) drawArrow(context, arrow, width, height);
    if (document.activeElement === this.canvas) {
      context.strokeStyle = "#fff";
      context.lineWidth = 1.5;
      context.beginPath();
      context.arc(this.cursor.x * width, this.cursor.y * height, this.painting ? BRUSH * width : 5, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  // Short lines: which way, and by their length how far compared with the longest arrow.
  drawField(context, strokes, width, height) {
    const longest = Math.max(0, ...strokes.map(([x0, y0, x1, y1]) => Math.hypot((x1 - x0) * width, (y1 - y0) * height)));
    if (!longest) return;
    const cell = width / COLUMNS;
    const painted = this.painted ? this.mask.getContext("2d").getImageData(0, 0, this.mask.width, this.mask.height) : null;
    context.strokeStyle = "rgb(255 255 255 / 75%)";
    context.lineWidth = 1.2;
    context.beginPath();
    for (let y = cell / 2; y < height; y += cell) {
      for (let x = cell / 2; x < width; x += cell) {
        if (painted) {
          const at = Math.floor((y / height) * painted.height) * painted.width + Math.floor((x / width) * painted.width);
          if (!painted.data[4 * at + 3]) continue;
        }
        const [dx, dy] = fieldAt(strokes, x, y, width, height);
        if (!dx && !dy) continue;
        context.moveTo(x, y);
        context.lineTo(x + (0.85 * cell * dx) / longest, y + (0.85 * cell * dy) / longest);
      }
    }
    context.stroke();
  }
}

// The mean of the strokes by weight exp(-(distance / sigma)^2), where one of them is near; as dense_field has it.
export function fieldAt(strokes, x, y, width, height) {
  const sigma = (SIGMA_AT_512 * Math.min(width, height)) / 512;
  let [dx, dy, total, largest] = [0, 0, 0, 0];
  for (const [x0, y0, x1, y1] of strokes) {
    const weight = Math.exp(-((x - x0 * width) ** 2 + (y - y0 * height) ** 2) / sigma ** 2);
    dx += weight * (x1 - x0) * width;
    dy += weight * (y1 - y0) * height;
    total += weight;
    largest = Math.max(largest, weight);
  }
  return largest > THRESHOLD ? [dx / total, dy / total] : [0, 0];
}

function drawArrow(context, [x0, y0, x1, y1], width, height) {
  const [from, to] = [[x0 * width, y0 * height], [x1 * width, y1 * height]];
  const angle = Math.atan2(to[1] - from[1], to[0] - from[0]);
  for (const [style, line] of [["rgb(0 0 0 / 55%)", 6], ["#ffd43b", 3]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.lineCap = "round";
    context.beginPath();
    if (x0 === x1 && y0 === y1) {
      context.arc(...from, 6, 0, 2 * Math.PI);
      context.moveTo(from[0] - 3, from[1]);
      context.lineTo(from[0] + 3, from[1]);
    } else {
      context.moveTo(...from);
      context.lineTo(...to);
      for (const side of [2.6, -2.6]) {
        context.moveTo(...to);
        context.lineTo(to[0] + 11 * Math.cos(angle + side), to[1] + 11 * Math.sin(angle + side));
      }
    }
    context.stroke();
  }
}
