// One job on the stage: what there is to see of it, how far it is, and what can be done with it.

import * as api from "./api.js";
import { announce, calm, icon, make } from "./dom.js";
import { duration, insideFile } from "./facts.js";
import { readMetadata } from "./metadata.js";
import { happened, letGo } from "./picture.js";

export class Pane {
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
    this.glimpse = make("img", { className: "glimpse", alt: "" });
    this.glimpse.hidden = true;
    this.shut = make("button", { type: "button", className: "round shut", title: "Close" }, icon("close"));
    this.shut.addEventListener("click", () => this.putAway());
    this.screen = make("div", { className: "screen" }, this.still, this.glimpse, this.letter, this.shut);
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
    clearInterval(this.turning);
    if (this.stillAddress) URL.revokeObjectURL(this.stillAddress);
    if (this.element) letGo(this.element);
  }

  putAway() {
    this.stage.show(this.stage.ids.filter((id) => id !== this.id));
  }

  async follow() {
    try {
      for await (const { video, preview, lost } of api.changes(this.id, this.leaving.signal)) {
        if (preview) this.show(preview.frames);
        else if (lost) this.say(`${lost.message} The job continues; trying again …`, "lost");
        else await this.update(video);
      }
    } catch (fault) {
      this.say(fault.message, "failed");
      announce(fault.message);
      this.actions.replaceChildren(this.action("close", "Close", () => this.putAway()));
      this.bar.hidden = true;
    }
  }

  // How the video will look: a few small frames, one after the other.
  show(frames) {
    let at = 0;
    const next = () => {
      this.glimpse.src = frames[at];
      at = (at + 1) % frames.length;
    };
    clearInterval(this.turning);
    if (!calm.matches) this.turning = setInterval(next, 250);
    next();
    this.glimpse.hidden = false;
  }

  async update(video) {
    const before = this.video?.status;
    this.video = video;
    this.root.dataset.status = video.status;
    this.screen.style.setProperty("--left", 1 - video.progress / 100);
    if (video.status === "completed" && !this.address) await this.load();
    if (this.leaving.signal.aborted) return;
    if (api.FINAL.has(video.status)) {
      clearInterval(this.turning);
      this.glimpse.hidden = true;
    }
    this.bar.hidden = api.FINAL.has(video.status);
    if (video.status === "in_progress") this.bar.value = video.progress;
    else this.bar.removeAttribute("value");
    this.tell(video);
    if (before !== video.status) this.stage.refresh();
    this.stage.on.changed(video);
  }

  tell(video) {
    const seconds = video.estimated_seconds_left ?? (video.status === "in_progress" ? this.ownEstimate(video.progress) : null);
    const left = seconds === null ? "" : ` · about ${duration(seconds)} left`;
    const steps = video.steps ? `Step ${video.step} of ${video.steps}` : `${video.progress} %`;
    const texts = {
      queued: `Waiting in the queue${left}`,
      in_progress: video.progress >= 99 ? "Writing the video" : `${steps}${left}`,
      completed: this.trouble,
      failed: `This video failed: ${video.error?.message ?? "no reason was given"}`,
      cancelled: "Cancelled",
    };
    this.say(texts[video.status], this.trouble ? "failed" : video.status);
    const quarter = Math.floor(video.progress / 25) * 25;
    const plain = { queued: "Waiting in the queue", in_progress: `${quarter} percent done` };
    announce(plain[video.status] ?? (texts[video.status] || "The video is ready"));
  }

  say(text, kind = "") {
    this.words.textContent = text;
    this.words.dataset.kind = kind;
  }

  // Seconds, from the pace since this page first saw it move: server and browser need not agree on the time.
  ownEstimate(progress) {
    const now = performance.now();
    this.first ??= { progress, now };
    const seconds = (now - this.first.now) / 1000;
    const done = progress - this.first.progress;
    return seconds < 2 || done < 3 ? null : ((100 - progress) / done) * seconds;
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
    const file = await this.fetch();
    if (!file) return;
    const player = make("video", { muted: true, playsInline: true, loop: true, preload: "auto", tabIndex: -1 });
    player.setAttribute("aria-label", `Video: ${this.video.prompt}`);
    this.address = player.src = URL.createObjectURL(file);
    this.name = file.name;
    this.element = player;
    const unplayable = "This browser cannot play the video, but you can download it.";
    await happened(player, "loadeddata").catch(() => (this.trouble = unplayable));
    player.addEventListener("click", () => this.stage.transport.toggle());
    this.still.hidden = true;
    this.screen.prepend(player);
    if (!this.trouble) this.player = player;
    const written = Object.entries(await readMetadata(file)).filter(([name]) => !["comment", "title"].includes(name));
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
        link.download = this.name;
        buttons.push(link);
        if (!letter) {
          buttons.push(this.action("share", "Share", () => stage.open(stage.share, video)));
          if (this.player) buttons.push(this.action("compare", "Change", () => stage.open(stage.variant, video)));
        }
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
