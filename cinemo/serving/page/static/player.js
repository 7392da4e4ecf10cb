// Playing one video, or two in step: play, loop, and a scrubber that counts frames.

import { calm, icon, make } from "./dom.js";

const APART = 0.04; // seconds; less than half a frame at 12 frames per second

export class Transport {
  videos = [];
  looping = true;

  constructor() {
    this.playButton = make("button", { type: "button", className: "round" });
    this.playButton.addEventListener("click", () => this.toggle());
    this.scrubber = make("input", { type: "range", className: "scrub", min: 0, max: 0, "aria-label": "Frame" });
    this.scrubber.addEventListener("input", () => this.seek(Number(this.scrubber.value)));
    this.counter = make("output", { className: "counter", "aria-hidden": "true" });
    this.loopButton = make("button", { type: "button", className: "round quiet", title: "Loop" }, icon("loop"));
    this.loopButton.setAttribute("aria-label", "Loop");
    this.loopButton.setAttribute("aria-pressed", "true");
    this.loopButton.addEventListener("click", () => this.setLoop(!this.looping));
    const parts = [this.playButton, this.scrubber, this.counter, this.loopButton];
    this.root = make("div", { className: "transport", role: "group", "aria-label": "Player" }, ...parts);
    this.root.hidden = true;
  }

  // videos: <video> elements that have loaded; frames and fps are those of the model.
  attach(videos, frames, fps) {
    this.detach();
    this.videos = videos;
    this.fps = fps;
    this.frames = frames;
    this.root.hidden = !videos.length;
    if (!videos.length) return;
    this.scrubber.max = frames - 1;
    for (const video of videos) {
      video.loop = this.looping;
      video.currentTime = 0;
    }
    this.leader.addEventListener("play", this.refresh);
    this.leader.addEventListener("pause", this.refresh);
    this.refresh();
    if (!calm.matches) this.play();
    this.follow();
  }

  detach() {
    cancelAnimationFrame(this.tick);
    if (this.leader) {
      this.leader.removeEventListener("play", this.refresh);
      this.leader.removeEventListener("pause", this.refresh);
    }
    this.videos = [];
    this.root.hidden = true;
  }

  get leader() {
    return this.videos[0];
  }

  play() {
    if (this.leader.ended) for (const video of this.videos) video.currentTime = 0;
    // Refused where a browser saves power: then the button still says "Play".
    return Promise.all(this.videos.map((video) => video.play().catch(() => {})));
  }

  pause() {
    for (const video of this.videos) video.pause();
  }

  toggle() {
    if (this.leader.paused) this.play();
    else this.pause();
  }

  seek(frame) {
    this.pause();
    for (const video of this.videos) video.currentTime = (frame + 0.5) / this.fps;
    this.show(frame);
  }

  setLoop(looping) {
    this.looping = looping;
    this.loopButton.setAttribute("aria-pressed", String(looping));
    for (const video of this.videos) video.loop = looping;
  }

  refresh = () => {
    const playing = this.leader && !this.leader.paused;
    this.playButton.replaceChildren(icon(playing ? "pause" : "play"));
    this.playButton.setAttribute("aria-label", playing ? "Pause" : "Play");
    this.playButton.title = playing ? "Pause" : "Play";
  };

  follow = () => {
    const { leader } = this;
    if (!leader) return;
    if (!leader.paused) {
      for (const video of this.videos.slice(1)) this.keepUp(video, leader);
      this.show(Math.min(this.frames - 1, Math.floor(leader.currentTime * this.fps)));
    }
    this.tick = requestAnimationFrame(this.follow);
  };

  // At the turn of a loop one is at its end and the other at its beginning: that is near, not far.
  keepUp(video, leader) {
    const apart = Math.abs(video.currentTime - leader.currentTime);
    if (Math.min(apart, Math.abs(leader.duration - apart)) > APART) video.currentTime = leader.currentTime;
    if (video.paused) video.play().catch(() => {});
  }

  show(frame) {
    this.scrubber.value = frame;
    this.scrubber.style.setProperty("--filled", frame / Math.max(1, this.frames - 1));
    this.scrubber.setAttribute("aria-valuetext", `Frame ${frame + 1} of ${this.frames}`);
    this.counter.textContent = `${frame + 1} / ${this.frames}`;
  }
}
