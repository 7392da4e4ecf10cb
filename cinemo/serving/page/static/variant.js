// The small form that starts a second video with one setting changed.

import { make } from "./dom.js";
import { drawSeed } from "./seed.js";

const MAX_PROMPT = 4000; // letters

// [name, title, what to begin with, properties of the input, how to read it]
function choice(control, now) {
  const { name, kind, minimum, maximum } = control;
  const title = /^[A-Z][a-z]/.test(control.title) ? control.title.toLowerCase() : control.title;
  if (kind === "boolean") return [name, title, !now, { type: "checkbox", role: "switch" }, (input) => input.checked];
  if (kind === "choice") return [name, title, now, { options: control.choices }, (input) => input.value];
  const limits = { type: "number", min: minimum ?? "", max: maximum ?? "", step: kind === "integer" ? 1 : 0.1 };
  return [name, title, another(control, now), limits, (input) => Number(input.value)];
}

// A value far enough from the present one that the difference shows.
function another(control, now) {
  const { levels, kind, minimum, maximum } = control;
  if (control.name === "seed") return drawSeed();
  if (levels.length) return now > maximum / 2 ? 2 : maximum - 2;
  if (minimum === null || maximum === null) return 2 * now;
  if (kind === "integer") return Math.min(maximum, 2 * now);
  return now > minimum ? minimum : Number(((minimum + maximum) / 7).toFixed(1));
}

export class VariantForm {
  // start({name, value}, form) is called when the second video is wanted; it reports through form.note.
  constructor(start) {
    this.select = make("select", { id: "variant-name" });
    this.place = make("span", { className: "variant-value" });
    this.button = make("button", { className: "button primary" }, "Animate and compare");
    this.note = make("div", { className: "form-note", role: "alert" });
    const cancel = make("button", { type: "button", className: "button quiet" }, "Close");
    cancel.addEventListener("click", () => this.close());
    this.root = make("form", { className: "panel variant" },
      make("p", {}, "The same picture and settings with one change; both play side by side."),
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
    const words = ["prompt", "the words", video.prompt, { long: true, maxLength: MAX_PROMPT, required: true }, (input) => input.value];
    const settings = model.controls
      .filter(({ name, kind, place }) => place !== "api" && !["text", "pair", "vectors"].includes(kind) && ![undefined, null].includes(video[name]))
      .map((control) => choice(control, video[control.name]));
    this.choices = [words, ...settings];
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
    const { options, long, ...plain } = properties;
    this.root.classList.toggle("worded", Boolean(long));
    if (options) this.input = make("select", { id: "variant-value" }, ...options.map((each) => make("option", { value: each }, each)));
    else if (long) this.input = make("textarea", { id: "variant-value", rows: 2, ...plain });
    else this.input = make("input", { id: "variant-value", required: properties.type === "number", ...plain });
    if (properties.type === "checkbox") this.input.checked = value;
    else this.input.value = value;
    this.place.replaceChildren(this.input);
  }
}
