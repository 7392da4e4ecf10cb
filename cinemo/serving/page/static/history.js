// Earlier jobs, the newest first: a card each, with a frame of the video.

import * as api from "./api.js";
import { byId, calm, icon, make } from "./dom.js";
import { letGo } from "./picture.js";

const PAGE = 12;
const PERIOD = 2000; // milliseconds between two looks while something runs

export class History {
  cards = new Map();
  wanted = PAGE;
  current = [];

  // on: {show(id), compare(id)}
  constructor(on) {
    this.on = on;
    this.list = byId("history-list");
    this.more = byId("history-more");
    this.note = byId("history-note");
    this.more.addEventListener("click", async () => {
      const last = this.list.lastElementChild;
      this.wanted += PAGE;
      await this.refresh();
      last?.nextElementSibling?.querySelector("button").focus();
    });
    this.seen = new IntersectionObserver((entries) => {
      const near = entries.filter((entry) => entry.isIntersecting);
      for (const { target } of near) this.cards.get(target.dataset.id)?.picture();
    }, { rootMargin: "200px" });
    // Other tabs of this browser say when they started, cancelled or deleted something.
    this.channel = new BroadcastChannel("cinemo");
    this.channel.addEventListener("message", () => this.refresh());
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
  }

  // Cards say how much moves, where the model has a control of it.
  setModel(model) {
    this.on.control = model.controls.find(({ levels }) => levels.length);
  }

  // Ask for as many jobs as are shown, and show those.
  async refresh() {
    clearTimeout(this.timer);
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const videos = [];
    let more = true;
    try {
      while (more && videos.length < this.wanted) {
        const page = await api.page(videos.at(-1)?.id, Math.min(100, this.wanted - videos.length));
        videos.push(...page.data);
        more = page.has_more && page.data.length > 0;
      }
      this.note.textContent = videos.length ? "" : "Nothing yet. Your videos will be listed here.";
    } catch (fault) {
      this.note.textContent = `${fault.message} The list is not up to date.`;
      this.timer = setTimeout(() => document.hidden || this.refresh(), 2 * PERIOD);
      return;
    }
    if (turn !== this.turn) return; // a later question has been asked meanwhile
    this.arrange(videos);
    this.more.hidden = !more;
    if (videos.some((video) => !api.FINAL.has(video.status))) {
      this.timer = setTimeout(() => document.hidden || this.refresh(), PERIOD);
    }
  }

  arrange(videos) {
    const known = new Set(videos.map((video) => video.id));
    for (const [id, card] of this.cards) {
      if (!known.has(id)) {
        card.close();
        this.cards.delete(id);
      }
    }
    videos.forEach((video, at) => {
      let card = this.cards.get(video.id);
      if (!card) {
        card = new Card(video, this.on);
        this.cards.set(video.id, card);
        this.seen.observe(card.root);
      }
      card.update(video);
      if (this.list.children[at] !== card.root) this.list.insertBefore(card.root, this.list.children[at] ?? null);
    });
    this.mark(this.current);
  }

  // A job's newer state, known before the next look. New jobs and deletions are told to other tabs.
  changed(video) {
    this.cards.get(video.id)?.update(video);
  }

  async started() {
    this.channel.postMessage("changed");
    await this.refresh();
  }

  // Which jobs are on the stage.
  mark(ids) {
    this.current = ids;
    for (const [id, card] of this.cards) card.mark(ids);
  }
}

class Card {
  status = "";

  constructor(video, on) {
    this.on = on;
    this.id = video.id;
    this.thumb = make("span", { className: "thumb" });
    this.badge = make("span", { className: "badge" });
    this.title = make("span", { className: "card-title" });
    this.meta = make("span", { className: "card-meta" });
    const box = make("span", { className: "thumb-box" }, this.thumb, this.badge);
    this.main = make("button", { type: "button", className: "card-main" }, box, this.title, this.meta);
    this.main.addEventListener("click", () => on.show(this.id));
    this.compare = make("button", { type: "button", className: "round card-compare" }, icon("compare"));
    this.compare.title = "Compare with the video above";
    this.compare.addEventListener("click", () => on.compare(this.id));
    this.root = make("li", { className: "card" }, this.main, this.compare);
    this.root.dataset.id = this.id;
    this.main.addEventListener("pointerenter", () => this.play());
    this.main.addEventListener("pointerleave", () => this.rest());
    this.main.addEventListener("focus", () => this.play());
    this.main.addEventListener("blur", () => this.rest());
  }

  update(video) {
    this.title.textContent = video.prompt || "(no prompt)";
    const { control } = this.on;
    const level = control?.words.findLast(([from]) => from <= video[control.name])?.[1] ?? "";
    this.meta.textContent = [level, ago(video.created_at)].filter(Boolean).join(" · ");
    this.compare.setAttribute("aria-label", `Compare with: ${video.prompt}`);
    const badges = { queued: "queued", in_progress: `${video.progress} %`, failed: "failed", cancelled: "cancelled" };
    this.badge.textContent = badges[video.status] ?? "";
    this.root.dataset.status = video.status;
    this.root.style.setProperty("--done", video.progress / 100);
    if (video.status === "completed" && this.status && this.status !== "completed") {
      this.status = video.status;
      this.picture();
    }
    this.status = video.status;
  }

  mark(ids) {
    if (ids.includes(this.id)) this.main.setAttribute("aria-current", "true");
    else this.main.removeAttribute("aria-current");
    this.compare.hidden = this.status !== "completed" || !ids.length || ids.includes(this.id);
  }

  close() {
    this.rest();
    this.root.remove();
    if (this.still) URL.revokeObjectURL(this.still.src);
  }

  // The middle frame; asked for when the card comes into sight.
  async picture() {
    if (this.status !== "completed" || this.drawn) return;
    this.drawn = true;
    try {
      const src = URL.createObjectURL(await api.thumbnail(this.id));
      this.still = make("img", { alt: "", src });
      this.thumb.replaceChildren(this.still);
    } catch {
      this.drawn = false; // asked for again when it is next seen
    }
  }

  async play() {
    if (calm.matches || !this.still || this.video) return;
    const blob = await api.content(this.id);
    const video = make("video", { muted: true, loop: true, playsInline: true, "aria-hidden": "true" });
    video.src = URL.createObjectURL(blob);
    this.video = video;
    video.addEventListener("playing", () => this.video === video && this.thumb.replaceChildren(video), { once: true });
    video.play().catch(() => {});
  }

  rest() {
    if (!this.video) return;
    letGo(this.video);
    this.video = null;
    this.thumb.replaceChildren(this.still);
  }
}

function ago(seconds) {
  const minutes = Math.max(0, (Date.now() / 1000 - seconds) / 60);
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${Math.round(minutes)} min ago`;
  if (minutes < 36 * 60) return `${Math.round(minutes / 60)} h ago`;
  return new Date(1000 * seconds).toLocaleDateString([], { day: "numeric", month: "short" });
}
