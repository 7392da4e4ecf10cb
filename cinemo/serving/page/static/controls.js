// The widgets of a model's controls, made from what /v1/models says of them; see schema.Control.

import { byId, help, icon, make } from "./dom.js";
import { DrawingField } from "./drawing.js";
import { LevelsField } from "./motion.js";
import { checkPicture } from "./picture.js";
import { drawSeed } from "./seed.js";

const NUMBERS = ["integer", "number"];

export class ControlFields {
  fields = new Map(); // name -> {root, value}

  setModel(model) {
    this.controls = model.controls;
    this.fields = new Map();
    const shown = model.controls.filter(({ place }) => place !== "api");
    // What is painted on the drawing board is the model's picture of that name.
    const mask = shown.some(({ kind }) => kind === "vectors") && model.pictures.find(({ name }) => name === "mask");
    this.board = null;
    for (const control of shown) {
      const field = control.kind === "vectors" ? new DrawingField(control, mask?.name) : fieldOf(control);
      if (control.kind === "vectors") this.board = field;
      this.fields.set(control.name, field);
    }
    const further = furtherChoices(model);
    this.further = further.map(({ name }) => name);
    for (const control of further) this.fields.set(control.name, new ChoiceField(control));
    const front = shown.filter(({ place }) => place === "front");
    const folded = [...further, ...shown.filter(({ place }) => place === "folded")];
    byId("front-controls").replaceChildren(...this.arranged(front));
    byId("folded-controls").replaceChildren(...this.arranged(folded));
    byId("more").hidden = folded.length === 0;
    const pictures = model.pictures.filter((picture) => picture !== mask);
    byId("pictures").replaceChildren(...pictures.map((each) => pictureField(each, model.picture_limits)));
    this.pictures = pictures.map(({ name }) => name);
  }

  get names() {
    return [...this.fields.keys(), ...this.pictures];
  }

  // What the form holds; an empty field is the server's to fill.
  get values() {
    const values = Object.fromEntries([...this.fields].map(([name, field]) => [name, field.value]));
    const chosen = this.pictures.map((name) => [name, byId(name).files[0]]).filter(([, file]) => file);
    return { ...values, ...Object.fromEntries(chosen) };
  }

  // The same with what was painted, which takes a moment to become a file.
  async whole() {
    const mask = this.board?.value ? await this.board.maskFile() : null;
    return mask ? { ...this.values, [this.board.maskName]: mask } : this.values;
  }

  // settings: by the names of the form, or by those inside a video's file.
  fill(settings) {
    for (const control of this.controls) {
      const value = settings[control.name] ?? settings[control.setting];
      if (value !== undefined && value !== null && this.fields.has(control.name)) this.fields.get(control.name).value = value;
    }
    for (const name of this.further) this.fields.get(name).value = settings[name] ?? "";
  }

  // files: {name: File} of an earlier video; what it did not have is emptied.
  async takePictures(files) {
    for (const name of this.pictures) {
      const transfer = new DataTransfer();
      if (files[name]) transfer.items.add(files[name]);
      byId(name).files = transfer.files;
    }
    await this.board?.takeMask(files[this.board.maskName] ?? null);
  }

  // Two small fields share a line.
  arranged(controls) {
    const rows = [];
    for (const control of controls) {
      const { root } = this.fields.get(control.name);
      const small = NUMBERS.includes(control.kind) && !control.levels.length && !isDrawn(control);
      const last = rows.at(-1);
      if (small && last?.className === "pair" && last.children.length === 1) last.append(root);
      else rows.push(small ? make("div", { className: "pair" }, root) : root);
    }
    for (const row of rows) if (row.className === "pair" && row.children.length === 1) row.classList.add("single");
    return rows;
  }
}

// What a model offers beside its controls: qualities that were measured, and adapters that it was loaded with.
function furtherChoices({ qualities, adapters }) {
  const share = ({ passes }) => Math.round((100 * passes) / qualities.best.passes);
  const work = Object.entries(qualities).map(([name, way]) => [name, `${name}, ${share(way)}\u00a0% of the work`]);
  const quality = {
    name: "quality",
    title: "Quality",
    choices: [["", "as usual"], ...work],
    default: "",
    description: "how close to the model's best; in place of the number of steps",
  };
  const adapter = {
    name: "lora",
    title: "Adapter",
    choices: [["", "none"], ...adapters.map((name) => [`${name}:1`, name])],
    default: "",
    description: "what the model learnt in addition, such as a style",
  };
  return [quality, adapter].filter(({ choices }) => choices.length > 1);
}

const isDrawn = (control) => control.name === "seed";

function fieldOf(control) {
  if (control.levels.length) return new LevelsField(control);
  if (isDrawn(control)) return new SeedField(control);
  if (control.kind === "boolean") return new SwitchField(control);
  if (control.kind === "choice") return new ChoiceField(control);
  return new TextField(control);
}

class TextField {
  constructor(control) {
    const mode = { integer: "numeric", number: "decimal" }[control.kind];
    const usual = control.kind === "text" ? "" : String(control.default ?? "");
    this.input = input(control, { type: "text", autocomplete: "off", placeholder: usual });
    if (mode) this.input.inputMode = mode;
    const label = make("label", { for: control.name }, control.title);
    const told = control.kind === "text" && control.place === "folded" ? null : note(control);
    this.root = make("div", { className: "field" }, label, this.input, told, error(control));
  }

  get value() {
    return this.input.value;
  }

  set value(value) {
    this.input.value = value;
  }
}

class SeedField extends TextField {
  constructor(control) {
    super(control);
    this.input.inputMode = "numeric";
    this.input.placeholder = "drawn at random";
    const dice = make("button", { type: "button", className: "square", title: "Draw a seed" }, icon("dice"));
    dice.id = "dice";
    dice.setAttribute("aria-label", "Draw a seed");
    dice.addEventListener("click", () => {
      this.input.value = drawSeed();
      this.input.dispatchEvent(new Event("input", { bubbles: true }));
    });
    const label = make("label", { for: control.name }, control.title);
    const [button, about] = help(control.title, `${control.name}-note`, "The number that chance starts from. "
      + "Another one gives another video; the same one, with all else the same, gives this video again.");
    const line = make("div", { className: "with-button" }, this.input, dice);
    this.root = make("div", { className: "field" }, make("div", { className: "named" }, label, button), line, about, error(control));
  }
}

class SwitchField {
  constructor(control) {
    this.input = input(control, { type: "checkbox", role: "switch", checked: Boolean(control.default) });
    this.said = control.default !== null;
    this.input.addEventListener("change", () => { this.said = true; });
    const label = make("label", { for: control.name }, make("span", {}, control.title), note(control, "span"));
    this.root = make("div", { className: "field switch-field" }, label, this.input, error(control));
  }

  get value() {
    return this.said ? this.input.checked : "";
  }

  set value(value) {
    this.said = true;
    this.input.checked = value;
  }
}

const optionOf = (value, label = value) => make("option", { value }, label);

class ChoiceField {
  constructor(control) {
    const options = control.choices.map((choice) => optionOf(...[choice].flat()));
    this.input = make("select", { id: control.name, "aria-describedby": `${control.name}-note ${control.name}-error` }, ...options);
    this.input.value = control.default;
    const label = make("label", { for: control.name }, control.title);
    this.root = make("div", { className: "field" }, label, this.input, note(control), error(control));
  }

  get value() {
    return this.input.value;
  }

  // One that is not offered, such as an adapter at another scale, is what an earlier video had.
  set value(value) {
    if (![...this.input.options].some((option) => option.value === String(value))) this.input.append(optionOf(value));
    this.input.value = value;
  }
}

function pictureField({ name, description: text }, limits) {
  const file = make("input", { id: name, type: "file", accept: "image/png,image/jpeg,image/webp", "aria-describedby": `${name}-error` });
  file.addEventListener("change", () => file.files[0] && checkPicture(file.files[0], limits).catch((fault) => {
    file.value = "";
    file.dispatchEvent(new CustomEvent("refused", { bubbles: true, detail: fault.message }));
  }));
  const label = make("label", { for: name }, `${text.charAt(0).toUpperCase()}${text.slice(1)}`);
  return make("div", { className: "field" }, label, file, error({ name }));
}

function input(control, properties) {
  const described = `${control.name}-note ${control.name}-error`;
  return make("input", { id: control.name, "aria-describedby": described, ...properties });
}

function note(control, tag = "p") {
  const text = `${control.description.charAt(0).toUpperCase()}${control.description.slice(1)}`;
  return make(tag, { className: "note", id: `${control.name}-note` }, text);
}

const error = ({ name }) => make("p", { id: `${name}-error`, className: "error", hidden: true });
