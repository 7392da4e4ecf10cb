// The small form that starts a second video with one setting changed.

import { make } from "./dom.js";
import { drawSeed } from "./seed.js";

export class VariantForm {
  // start({name, value}, form) is called when the second video is wanted; it reports through form.note.
  constructor(start) {
    this.select = make("select", { id: "variant-name" });
    this.place = make("span", { className: "variant-value" });
    this.button = make("button", { className: "button primary" }, "Animate and compare");
    this.note = make("div", { className: "form-note", role: "alert" });
    const cancel = make("button", { type: "button", className: "button quiet" }, "Close");
    cancel.addEventListener("click", () => this.close());
    this.root = make("form", { className: "variant", noValidate: false },
      make("p", {}, "Change one setting, and both play side by side."),
      make("div", { className: "variant-row" },
        make("span", {}, make("label", { for: "variant-name" }, "Change"), this.select),
        make("span", {}, make("label", { for: "variant-value" }, "to"), this.place)),
      make("div", { className: "actions" }, this.button, cancel), this.note);
    this.root.hidden = true;
    this.select.addEventListener("change", () => this.offer());
    this.root.addEventListener("submit", async (event) => {
      event.preventDefault();
      const [name, , , , read] = this.choices[this.select.selectedIndex];
      this.button.disabled = true;
      await start({ name, value: read(this.input) }, this).catch((error) => this.note.replaceChildren(error.message));
      this.button.disabled = false;
    });
  }

  open(video, model) {
    const number = (input) => Number(input.value);
    const last = model.motion_buckets - 1;
    const numeric = (min, max, step = 1) => ({ type: "number", min, max, step });
    const motion = video.motion_bucket > last / 2 ? 2 : last - 2;
    // name, title, what to begin with, properties of the input, how to read it
    this.choices = [
      ["motion_bucket", "motion", motion, numeric(0, last), number],
      ["seed", "seed", drawSeed(), numeric(0, Number.MAX_SAFE_INTEGER), number],
      ["dct_init", "DCTInit", !video.dct_init, { type: "checkbox", role: "switch" }, (input) => input.checked],
      ["num_inference_steps", "steps", Math.min(999, 2 * video.num_inference_steps), numeric(1, 999), number],
      ["guidance_scale", "guidance", video.guidance_scale > 1 ? 1 : 7.5, numeric(1, 50, 0.1), number],
    ];
    this.select.replaceChildren(...this.choices.map(([name, title]) => make("option", { value: name }, title)));
    this.note.replaceChildren();
    this.root.hidden = false;
    this.offer();
    this.select.focus();
    this.root.scrollIntoView({ block: "nearest" });
  }

  close() {
    this.root.hidden = true;
  }

  offer() {
    const [, , value, properties] = this.choices[this.select.selectedIndex];
    this.input = make("input", { id: "variant-value", required: properties.type === "number", ...properties });
    if (properties.type === "checkbox") this.input.checked = value;
    else this.input.value = value;
    this.place.replaceChildren(this.input);
  }
}
