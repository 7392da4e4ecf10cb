// The slider of the control that says how much moves, with its calibration: one bar a level, as high as the motion that
// it stands for.

import { help, make } from "./dom.js";

export class LevelsField {
  // control.levels: per value {bucket, ssim: [low, high], measured: 1 - SSIM or null}; see schema.MotionLevel.
  constructor(control) {
    const { name, title } = control;
    this.control = control;
    this.scale = control.levels;
    this.input = make("input", { id: name, type: "range", min: 0, max: this.scale.length - 1, step: 1 });
    this.input.addEventListener("input", () => this.show());
    this.word = make("span", { id: "motion-word" });
    this.reading = make("output", { id: "motion-value", for: name });
    const [button, note] = help(title, "motion-note");
    this.note = note;
    this.bars = this.drawn();
    const chart = make("div", { id: "motion-chart", className: "chart", "aria-hidden": "true" }, ...this.bars);
    this.root = make("div", { className: "field motion" },
      make("div", { className: "line" },
        make("span", { className: "named" }, make("label", { for: name }, title), button),
        make("span", { className: "reading" }, this.word, " ", this.reading)),
      chart, this.input, this.note, make("p", { id: `${name}-error`, className: "error", hidden: true }));
    this.input.setAttribute("aria-describedby", `motion-note ${name}-error`);
    this.value = control.default;
  }

  get value() {
    return Number(this.input.value);
  }

  set value(bucket) {
    this.input.value = bucket;
    this.show();
  }

  drawn() {
    const heights = this.heights(this.scale.length);
    const highest = Math.max(...heights, 1e-6);
    return heights.map((height, bucket) => {
      const known = this.measured.length ? this.scale[bucket].measured !== null : true;
      const bar = make("span", { className: known ? "bar" : "bar between" });
      bar.style.setProperty("--at", bucket / (heights.length - 1));
      bar.style.setProperty("--height", Math.max(0.05, height / highest));
      return bar;
    });
  }

  get measured() {
    return this.scale.filter((each) => each.measured !== null);
  }

  // What was measured, straight lines between; else where what each bucket stands for begins; else the bucket itself.
  heights(buckets) {
    const points = this.measured.map((each) => [each.bucket, each.measured]);
    return Array.from({ length: buckets }, (_, bucket) => {
      if (points.length) return between(points, bucket);
      const range = this.scale[bucket]?.ssim;
      return range ? 1 - range[1] : bucket;
    });
  }

  show() {
    const bucket = this.value;
    this.bars.forEach((bar, at) => bar.classList.toggle("on", at <= bucket));
    this.input.style.setProperty("--filled", bucket / Number(this.input.max));
    const word = this.control.words.findLast(([from]) => from <= bucket)?.[1] ?? "";
    this.reading.textContent = bucket;
    this.word.textContent = word;
    this.note.textContent = this.explain(bucket);
    this.input.setAttribute("aria-valuetext", [`${bucket} of ${this.input.max}`, word].filter(Boolean).join(", "));
  }

  explain(bucket) {
    const here = this.scale[bucket];
    if (!here) return this.control.description;
    const points = this.measured.map((each) => [each.bucket, each.measured]);
    const percent = (share) => `${Number((100 * share).toPrecision(2))}\u00a0%`;
    if (points.length) {
      const much = percent(between(points, bucket));
      const spread = here.interval ? `, in nine of ten videos by ${here.interval.map(percent).join(" to ")}` : "";
      return here.measured === null
        ? `The bars show how much this model's videos moved when they were measured. Here, between two measured settings, one frame and the next differ by about ${much}.`
        : `The bars show how much this model's videos moved when they were measured. Here one frame and the next differ by ${much}${spread}.`;
    }
    const [low, high] = here.ssim;
    const range = `${percent(1 - high)} to ${percent(1 - low)}`;
    return `Here the model is asked for one frame and the next to differ by ${range}. How well it keeps to that has not been measured.`;
  }
}

function between(points, x) {
  const right = points.find(([at]) => at >= x) ?? points.at(-1);
  const left = points.findLast(([at]) => at <= x) ?? points[0];
  if (left[0] === right[0]) return right[1];
  return left[1] + ((x - left[0]) / (right[0] - left[0])) * (right[1] - left[1]);
}
