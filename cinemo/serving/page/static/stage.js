// What is being looked at: one job, or two side by side that play in step.

import * as api from "./api.js";
import { byId, announce, icon, make } from "./dom.js";
import { readMetadata } from "./metadata.js";
import { firstFrame, happened } from "./picture.js";
import { Transport } from "./player.js";
import { VariantForm } from "./variant.js";

const LONG = 280; // letters of a prompt that a table shows

export class Stage {
  panes = [];
  model = null;
  pictures = new Map(); // id -> the File that was sent from this tab
  others = new Map(); // id -> {name: File} of those that were sent beside it

  // on: {reuse(video), variant(settings, file, form), changed(video), removed(id), shown(ids)}
  constructor(on) {
    this.on = on;
    this.transport = new Transport();
    this.variant = new VariantForm((change, form) => this.startVariant(change, form));
    byId("stage-variant").append(this.variant.root);
    document.addEventListener("keydown", (event) => this.onKey(event));
  }

  get ids() {
    return this.panes.map((pane) => pane.id);
  }

  // ids: none, one or two. A job that stays is not asked for anew.
  show(ids) {
    const focused = byId("stage").contains(document.activeElement);
    const kept = new Map(this.panes.map((pane) => [pane.id, pane]));
    this.transport.detach();
    this.panes = ids.map((id) => kept.get(id) ?? new Pane(id, this));
    for (const pane of kept.values()) if (!this.panes.includes(pane)) pane.close();
    byId("panes").replaceChildren(...this.panes.map((pane) => pane.root));
    byId("stage").dataset.count = ids.length;
    byId("stage-empty").hidden = ids.length > 0;
    this.variant.close();
    this.refresh();
    if (focused && ids.length && document.activeElement === document.body) byId("stage").focus({ preventScroll: true });
    this.on.shown(ids);
  }

  async pictureOf(video) {
    return this.pictures.get(video.id) ?? firstFrame(await api.content(video.id));
  }

  async startVariant({ name, value }, form) {
    const [pane] = this.panes;
    const file = await this.pictureOf(pane.video);
    const others = this.others.get(pane.video.id) ?? {};
    if ((pane.video.inputs ?? []).some((each) => !(each in others))) {
      throw new Error("That video was made with other pictures beside the first, which this tab does not have.");
    }
    const asBefore = { ...settingsOf(pane.video, this.model), ...others, [name]: value };
    const made = await this.on.variant(asBefore, file, form);
    if (made) this.show([pane.id, made.id]);
  }

  // After any change of a job: letters, tables and the player follow from what all panes hold.
  refresh() {
    const two = this.panes.length === 2;
    this.panes.forEach((pane, at) => pane.arrange(two ? "AB"[at] : ""));
    // One player for both below the two, or between a single video and its buttons: also in the order of the Tab key.
    const { root } = this.transport;
    if (this.panes.length === 1) this.panes[0].screen.after(root);
    else byId("stage-controls").append(root);
    const all = this.panes.length > 0 && this.panes.every((pane) => pane.player);
    const players = all ? this.panes.map((pane) => pane.player) : [];
    const playing = this.transport.videos;
    if (players.length !== playing.length || players.some((each, at) => each !== playing[at])) {
      const frames = Math.round(Math.min(...players.map((player) => player.duration)) * this.model.fps);
      this.transport.attach(players, frames, this.model.fps);
    }
    const known = this.panes.length > 0 && this.panes.every((pane) => pane.video);
    byId("stage-settings").replaceChildren(...(known ? [two ? this.differences() : this.facts()] : []));
    if (two) this.variant.close();
  }

  facts() {
    const { video, inside } = this.panes[0];
    const rows = told([video], this.model).filter(([name]) => name !== "prompt").map(([name, title]) =>
      make("div", {}, make("dt", {}, title), make("dd", {}, said(video[name]))),
    );
    const prompt = make("p", { className: "prompt" }, video.prompt);
    const box = make("div", { className: "facts" }, prompt, make("dl", {}, ...rows));
    if (inside) box.append(inside);
    if (video.expires_at) box.append(make("p", { className: "note" }, `Kept until ${when(video.expires_at)}.`));
    return box;
  }

  differences() {
    const [a, b] = this.panes.map((pane) => pane.video);
    const rows = told([a, b], this.model).map(([name, title]) => {
      const differs = String(a[name]) !== String(b[name]);
      const marked = differs ? make("span", { className: "visually-hidden" }, " (differs)") : null;
      const cells = [a, b].map((each) => make("td", {}, said(each[name])));
      return make("tr", { className: differs ? "differs" : "" }, make("th", { scope: "row" }, title, marked), ...cells);
    });
    const head = ["Setting", "A", "B"].map((title) => make("th", { scope: "col" }, title));
    return make("table", { className: "differences" },
      make("caption", { className: "visually-hidden" }, "Settings of both videos; those that differ are marked"),
      make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  }

  onKey(event) {
    const busy = event.target.closest("input, textarea, select, button, a, summary, dialog");
    if (event.key === " " && !busy && this.transport.videos.length) {
      event.preventDefault();
      this.transport.toggle();
    }
  }
}

class Pane {
  video = null;
  player = null;
  inside = null;
  trouble = ""; // why the video cannot be shown

  constructor(id, stage) {
    this.id = id;
    this.stage = stage;
    this.leaving = new AbortController();
    this.letter = make("span", { className: "letter" });
    this.still = make("img", { className: "still", alt: "" });
    this.still.hidden = true;
    this.shut = make("button", { type: "button", className: "round shut", title: "Close" }, icon("close"));
    this.shut.addEventListener("click", () => this.putAway());
    this.screen = make("div", { className: "screen" }, this.still, this.letter, this.shut);
    this.bar = make("progress", { max: 100, "aria-label": "Progress" });
    this.words = make("p", { className: "status" });
    this.actions = make("div", { className: "actions" });
    const caption = make("figcaption", {}, this.bar, this.words, this.actions);
    this.root = make("figure", { className: "pane" }, this.screen, caption);
    const picture = stage.pictures.get(id);
    if (picture) {
      this.still.src = this.stillAddress = URL.createObjectURL(picture);
      this.still.hidden = false;
    }
    this.say("Contacting the server …");
    this.follow();
  }

  close() {
    this.leaving.abort();
    for (const address of [this.stillAddress, this.address]) if (address) URL.revokeObjectURL(address);
  }

  putAway() {
    this.stage.show(this.stage.ids.filter((id) => id !== this.id));
  }

  async follow() {
    try {
      for await (const { video, lost } of api.changes(this.id, this.leaving.signal)) {
        if (lost) this.say(`${lost.message} The job continues; trying again …`, "lost");
        else await this.update(video);
      }
    } catch (fault) {
      this.say(fault.message, "failed");
      announce(fault.message);
      this.actions.replaceChildren(this.action("close", "Close", () => this.putAway()));
      this.bar.hidden = true;
    }
  }

  async update(video) {
    const before = this.video?.status;
    this.video = video;
    this.root.dataset.status = video.status;
    this.screen.style.setProperty("--left", 1 - video.progress / 100);
    if (video.status === "completed" && !this.address) await this.load();
    if (this.leaving.signal.aborted) return;
    this.bar.hidden = api.FINAL.has(video.status);
    if (video.status === "in_progress") this.bar.value = video.progress;
    else this.bar.removeAttribute("value");
    this.tell(video);
    if (before !== video.status) this.stage.refresh();
    this.stage.on.changed(video);
  }

  tell(video) {
    const left = video.status === "in_progress" ? this.timeLeft(video.progress) : "";
    const steps = video.steps ? `Step ${video.step} of ${video.steps}` : `${video.progress} %`;
    const texts = {
      queued: "Waiting in the queue",
      in_progress: video.progress >= 99 ? "Writing the video" : `${steps}${left}`,
      completed: this.trouble,
      failed: `This video failed: ${video.error?.message ?? "no reason was given"}`,
      cancelled: "Cancelled",
    };
    this.say(texts[video.status], this.trouble ? "failed" : video.status);
    const quarter = Math.floor(video.progress / 25) * 25;
    announce(video.status === "in_progress" ? `${quarter} percent done` : texts[video.status] || "The video is ready");
  }

  say(text, kind = "") {
    this.words.textContent = text;
    this.words.dataset.kind = kind;
  }

  // From the pace since this page first saw it move: server and browser need not agree on the time.
  timeLeft(progress) {
    const now = performance.now();
    this.first ??= { progress, now };
    const seconds = (now - this.first.now) / 1000;
    const done = progress - this.first.progress;
    if (seconds < 2 || done < 3) return "";
    const left = Math.ceil(((100 - progress) / done) * seconds);
    return left < 90 ? ` · about ${left} s left` : ` · about ${Math.round(left / 60)} min left`;
  }

  async fetch() {
    while (!this.leaving.signal.aborted) {
      try {
        return await api.content(this.id);
      } catch (fault) {
        if (fault.status >= 400 && fault.status < 500) throw fault;
        this.say(`${fault.message} The video is kept; trying again …`, "lost");
        await api.sleep(2000, this.leaving.signal);
      }
    }
    return null;
  }

  async load() {
    const blob = await this.fetch();
    if (!blob) return;
    const player = make("video", { muted: true, playsInline: true, loop: true, preload: "auto", tabIndex: -1 });
    player.setAttribute("aria-label", `Video: ${this.video.prompt}`);
    this.address = player.src = URL.createObjectURL(blob);
    const unplayable = "This browser cannot play the video, but you can download it.";
    await happened(player, "loadeddata").catch(() => (this.trouble = unplayable));
    player.addEventListener("click", () => this.stage.transport.toggle());
    this.still.hidden = true;
    this.screen.prepend(player);
    if (!this.trouble) this.player = player;
    const written = Object.entries(await readMetadata(blob)).filter(([name]) => !["comment", "title"].includes(name));
    if (written.length) this.inside = insideFile(written);
  }

  // The letter is "" where the pane is alone.
  arrange(letter) {
    this.letter.textContent = letter;
    this.letter.hidden = this.shut.hidden = !letter;
    this.shut.setAttribute("aria-label", `Close ${letter}`);
    const { video, stage } = this;
    if (!video) return;
    const buttons = [];
    if (!api.FINAL.has(video.status)) buttons.push(this.action("close", "Cancel", () => this.cancel()));
    else {
      if (this.address) {
        const words = make("span", {}, "Download");
        const link = make("a", { className: "button primary", href: this.address }, icon("download"), words);
        link.download = `${video.id}.mp4`;
        buttons.push(link);
        if (!letter && this.player) buttons.push(this.action("compare", "Compare", () => stage.variant.open(video, stage.model)));
      }
      buttons.push(this.action("reuse", "Use settings", () => stage.on.reuse(video)));
      if (!letter) buttons.push(this.deletion());
    }
    const focused = [...this.actions.children].indexOf(document.activeElement);
    this.actions.replaceChildren(...buttons);
    if (focused >= 0) buttons[Math.min(focused, buttons.length - 1)].focus();
  }

  // Asks once more, on the same button.
  deletion() {
    const button = this.action("bin", "Delete", () => {
      if (button.classList.contains("danger")) return this.remove();
      button.classList.replace("quiet", "danger");
      button.lastChild.textContent = "Delete for good";
      return setTimeout(() => {
        button.classList.replace("danger", "quiet");
        button.lastChild.textContent = "Delete";
      }, 4000);
    }, "quiet");
    return button;
  }

  action(symbol, text, act, kind = "") {
    const words = make("span", {}, text);
    const button = make("button", { type: "button", className: `button ${kind}` }, icon(symbol), words);
    button.addEventListener("click", act);
    return button;
  }

  async cancel() {
    try {
      await this.update(await api.cancel(this.id));
    } catch (fault) {
      // 409: it was finished first, and its video is there.
      if (fault.status === 409) await this.update(await api.video(this.id));
      else this.say(fault.message, "failed");
    }
  }

  async remove() {
    try {
      await api.remove(this.id);
      this.putAway();
      this.stage.on.removed(this.id);
      announce("Deleted");
    } catch (fault) {
      this.say(fault.message, "failed");
    }
  }
}

// What a new job needs to be like an old one: the prompt, and every control of the model that the old one has.
function settingsOf(video, model) {
  const names = model.controls.map(({ name }) => name).filter((name) => ![undefined, null].includes(video[name]));
  return { prompt: video.prompt, ...Object.fromEntries(names.map((name) => [name, String(video[name])])) };
}

// [name, title] of the settings of some videos that are worth a line: of those that only programs ask for, what is not
// as usual.
function told(videos, model) {
  const controls = (model?.controls ?? []).filter(({ name, place, default: usual }) =>
    videos.some((video) => ![undefined, null, ""].includes(video[name])
      && (place !== "api" || String(video[name]) !== String(usual))));
  const own = controls.map(({ name, title }) => [name, title]);
  return [["prompt", "Prompt"], ...own, ["model", "Model"]];
}

function insideFile(written) {
  const rows = written.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text)));
  const title = make("summary", {}, "Settings inside the file");
  const hint = make("p", { className: "note" }, "Drop the downloaded file on this page to get them back.");
  return make("details", { className: "inside" }, title, hint, make("dl", {}, ...rows));
}

function said(value) {
  if (value === undefined || value === null) return "–";
  if (typeof value === "boolean") return value ? "on" : "off";
  const text = String(value);
  return text === "" ? "–" : text.length > LONG ? `${text.slice(0, LONG)} …` : text;
}

function when(seconds) {
  const date = new Date(1000 * seconds);
  const today = date.toDateString() === new Date().toDateString();
  const time = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  return today ? time : `${date.toLocaleDateString([], { weekday: "long", day: "numeric", month: "long" })}, ${time}`;
}
