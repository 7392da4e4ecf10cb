// What is being looked at: one job, or up to four side by side that play in step.

import * as api from "./api.js";
import { byId } from "./dom.js";
import { differencesOf, factsOf } from "./facts.js";
import { Pane } from "./pane.js";
import { firstFrame } from "./picture.js";
import { Transport } from "./player.js";
import { ShareForm } from "./share.js";
import { VariantForm } from "./variant.js";

export class Stage {
  panes = [];
  model = null;
  pictures = new Map(); // id -> the File that was sent from this tab

  // on: {reuse(video), remix(video, change, form), changed(video), removed(id), shown(ids)}
  constructor(on) {
    this.on = on;
    this.transport = new Transport();
    this.variant = new VariantForm((change, form) => this.startVariant(change, form));
    this.share = new ShareForm();
    byId("stage-forms").append(this.variant.root, this.share.root);
    document.addEventListener("keydown", (event) => this.onKey(event));
  }

  get ids() {
    return this.panes.map((pane) => pane.id);
  }

  // ids: of at most four. A job that stays is not asked for anew.
  show(ids) {
    const focused = byId("stage").contains(document.activeElement);
    const kept = new Map(this.panes.map((pane) => [pane.id, pane]));
    this.transport.detach();
    this.panes = ids.map((id) => kept.get(id) ?? new Pane(id, this));
    for (const pane of kept.values()) if (!this.panes.includes(pane)) pane.close();
    byId("panes").replaceChildren(...this.panes.map((pane) => pane.root));
    byId("stage").dataset.count = ids.length;
    byId("stage-empty").hidden = ids.length > 0;
    this.closeForms();
    this.refresh();
    if (focused && ids.length && document.activeElement === document.body) byId("stage").focus({ preventScroll: true });
    this.on.shown(ids);
  }

  // The picture as it was sent: from this tab, or the server; where it is gone there, the first frame stands in.
  async pictureOf(video) {
    const sent = this.pictures.get(video.id);
    if (sent) return sent;
    try {
      return await api.picture(video.id);
    } catch (fault) {
      if (fault.status !== 404) throw fault;
      return firstFrame(await api.content(video.id));
    }
  }

  async startVariant({ name, value }, form) {
    const [pane] = this.panes;
    const change = { model: this.model.id, prompt: pane.video.prompt, previews: true, [name]: value };
    const made = await this.on.remix(pane.video, change, form);
    if (made) this.show([pane.id, made.id]);
  }

  // form: one of the two below a single video.
  open(form, video) {
    this.closeForms();
    form.open(video, this.model);
  }

  closeForms() {
    this.variant.close();
    this.share.close();
  }

  // After any change of a job: letters, tables and the player follow from what all panes hold.
  refresh() {
    const several = this.panes.length > 1;
    this.panes.forEach((pane, at) => pane.arrange(several ? "ABCD"[at] : ""));
    // One player for all below them, or between a single video and its buttons: also in the order of the Tab key.
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
    const videos = this.panes.map((pane) => pane.video);
    const known = videos.length > 0 && videos.every(Boolean);
    const about = () => (several ? differencesOf(videos, this.model) : factsOf(videos[0], this.model, this.panes[0].inside));
    byId("stage-settings").replaceChildren(...(known ? [about()] : []));
    if (several) this.closeForms();
  }

  onKey(event) {
    const busy = event.target.closest("input, textarea, select, button, a, summary, dialog");
    if (event.key === " " && !busy && this.transport.videos.length) {
      event.preventDefault();
      this.transport.toggle();
    }
  }
}
