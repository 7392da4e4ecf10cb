// Giving a video to others: its address, the file itself where the system has a way to pass it on, a GIF.

import * as api from "./api.js";
import { announce, make } from "./dom.js";
import { when } from "./facts.js";

export class ShareForm {
  constructor() {
    this.address = make("input", { id: "share-link", type: "text", readOnly: true, "aria-describedby": "share-about" });
    this.address.addEventListener("focus", () => this.address.select());
    this.copied = make("span", {}, "Copy link");
    const copy = make("button", { type: "button", className: "button primary" }, this.copied);
    copy.addEventListener("click", () => this.copy());
    this.about = make("p", { className: "note", id: "share-about" });
    this.send = this.action("Send the video …", () => this.pass());
    const gif = this.action("Download as GIF", () => this.animate(gif));
    this.note = make("p", { className: "error", role: "alert", hidden: true });
    const shut = make("button", { type: "button", className: "button quiet" }, "Close");
    shut.addEventListener("click", () => this.close());
    this.root = make("div", { className: "panel", role: "group", "aria-label": "Share" },
      make("div", { className: "field" }, make("label", { for: "share-link" }, "Link to this video"),
        make("div", { className: "with-button" }, this.address, copy)),
      this.about, make("div", { className: "actions" }, this.send, gif, shut), this.note);
    this.root.hidden = true;
  }

  action(text, act) {
    const button = make("button", { type: "button", className: "button" }, text);
    button.addEventListener("click", act);
    return button;
  }

  async open(video) {
    this.video = video;
    // The place and the video's name alone: never a key, and nothing of what else is in this tab's address.
    this.address.value = `${location.origin}${location.pathname}#${video.id}`;
    const who = api.key.get()
      ? "It opens for those who have the key that made this video. The key is not in the link."
      : "It opens for everybody who can reach this server.";
    const until = video.expires_at ? ` The video is kept until ${when(video.expires_at)}.` : "";
    this.about.textContent = who + until;
    this.copied.textContent = "Copy link";
    this.note.hidden = true;
    this.root.hidden = false;
    this.file = await api.content(video.id);
    this.send.hidden = !navigator.canShare?.({ files: [this.file] });
    this.address.focus();
    this.root.scrollIntoView({ block: "nearest" });
  }

  close() {
    this.root.hidden = true;
  }

  // Browsers let only pages of https:// and of this machine write to the clipboard.
  async copy() {
    this.address.select();
    try {
      await navigator.clipboard.writeText(this.address.value);
      this.copied.textContent = "Copied";
    } catch {
      this.copied.textContent = "Press Ctrl+C";
    }
    announce(this.copied.textContent);
  }

  async pass() {
    try {
      await navigator.share({ files: [this.file], title: this.video.prompt });
    } catch (error) {
      if (error.name !== "AbortError") this.tell("This system does not pass the video on. Download it instead.");
    }
  }

  async animate(button) {
    button.disabled = true;
    try {
      const file = await api.gif(this.video.id);
      const address = URL.createObjectURL(file);
      make("a", { href: address, download: file.name }).click();
      setTimeout(() => URL.revokeObjectURL(address), 60_000);
    } catch (fault) {
      this.tell(fault.message);
    }
    button.disabled = false;
  }

  tell(text) {
    this.note.textContent = text;
    this.note.hidden = false;
  }
}
