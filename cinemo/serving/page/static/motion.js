// The motion slider with its calibration: one bar a bucket, as high as the motion it stands for.

import { byId, make } from "./dom.js";

// From which bucket on they hold.
const WORDS = [
  [0, "almost still"], [4, "gentle"], [8, "moderate"], [12, "lively"], [16, "strong"], [19, "maximum"],
];

export class MotionField {
  constructor() {
    this.input = byId("motion_bucket");
    this.bars = [];
    this.scale = [];
    this.input.addEventListener("input", () => this.show());
  }

  get value() {
    return Number(this.input.value);
  }

  set value(bucket) {
    this.input.value = bucket;
    this.show();
  }

  // model.motion: per bucket {bucket, ssim: [low, high], measured: 1 - SSIM or null}; see schema.MotionBucket.
  setModel(model) {
    this.scale = model.motion ?? [];
    this.input.max = model.motion_buckets - 1;
    const heights = this.heights(model.motion_buckets);
    const highest = Math.max(...heights, 1e-6);
    this.bars = heights.map((height, bucket) => {
      const known = this.measured.length ? this.scale[bucket].measured !== null : true;
      const bar = make("span", { className: known ? "bar" : "bar between" });
      bar.style.setProperty("--at", bucket / (heights.length - 1));
      bar.style.setProperty("--height", Math.max(0.05, height / highest));
      return bar;
    });
    byId("motion-chart").replaceChildren(...this.bars);
    this.value = model.defaults.motion_bucket;
  }

  get measured() {
    return this.scale.filter((each) => each.measured !== null);
  }

  // What was measured, straight lines between; else the middle of what each bucket stands for; else the bucket itself.
  heights(buckets) {
    const points = this.measured.map((each) => [each.bucket, each.measured]);
    return Array.from({ length: buckets }, (_, bucket) => {
      if (points.length) return between(points, bucket);
      const range = this.scale[bucket]?.ssim;
      return range ? 1 - (range[0] + range[1]) / 2 : bucket;
    });
  }

  show() {
    const bucket = this.value;
    this.bars.forEach((bar, at) => bar.classList.toggle("on", at <= bucket));
    this.input.style.setProperty("--filled", bucket / Number(this.input.max));
    const [, word] = WORDS.findLast(([from]) => from <= bucket);
    byId("motion-value").textContent = bucket;
    byId("motion-word").textContent = word;
    byId("motion-note").textContent = this.explain(bucket);
    this.input.setAttribute("aria-valuetext", `${bucket} of ${this.input.max}, ${word}`);
  }

  explain(bucket) {
    const here = this.scale[bucket];
    if (!here) return "0 stays still, the highest moves most.";
    const points = this.measured.map((each) => [each.bucket, each.measured]);
    const percent = (share) => `${Math.round(100 * share)} %`;
    if (points.length) {
      const much = percent(between(points, bucket));
      return here.measured === null
        ? `Between two measured settings: neighbouring frames differ by about ${much} (1\u00a0−\u00a0SSIM).`
        : `Measured on this model: neighbouring frames differ by ${much} (1\u00a0−\u00a0SSIM).`;
    }
    const [low, high] = here.ssim;
    const range = `${percent(1 - high)} to ${percent(1 - low)}`;
    return `Asks for neighbouring frames that differ by ${range} (1\u00a0−\u00a0SSIM). Not yet measured on this model.`;
  }
}

function between(points, x) {
  const right = points.find(([at]) => at >= x) ?? points.at(-1);
  const left = points.findLast(([at]) => at <= x) ?? points[0];
  if (left[0] === right[0]) return right[1];
  return left[1] + ((x - left[0]) / (right[0] - left[0])) * (right[1] - left[1]);
}
