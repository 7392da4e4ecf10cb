// Choosing a picture: by the file dialogue, by dropping it anywhere on the page, or by pasting it.

import { byId } from "./dom.js";
import { readSettings } from "./metadata.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"];

export class PictureField {
  file = null;

  // report(message): "" clears it. onSettings(settings): a video of this system was dropped, with its settings inside.
  constructor({ report, onSettings }) {
    this.report = report;
    this.onSettings = onSettings;
    this.input = byId("input_reference");
    this.input.addEventListener("change", () => this.input.files[0] && this.take(this.input.files[0]));
    document.addEventListener("paste", (event) => {
      const [file] = event.clipboardData.files;
      if (file) {
        event.preventDefault();
        this.take(file);
      }
    });
    let depth = 0; // dragenter and dragleave come for every element that is crossed
    const dragging = (change, event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      depth = change === 0 ? 0 : Math.max(0, depth + change);
      document.body.classList.toggle("dragging", depth > 0);
    };
    document.addEventListener("dragenter", (event) => dragging(1, event));
    document.addEventListener("dragleave", (event) => dragging(-1, event));
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      dragging(0, event);
      event.preventDefault();
      if (event.dataTransfer.files[0]) this.take(event.dataTransfer.files[0]);
    });
  }

  // Show the file as it will be cropped. A video made here gives its settings and its first frame.
  async take(file) {
    if (file.type.startsWith("video/")) {
      const settings = await readSettings(file);
      if (!settings) return this.refuse(`${file.name} is a video that was not made here. Choose a picture.`);
      this.show(await firstFrame(file), `First frame of ${file.name}`);
      return this.onSettings(settings);
    }
    if (!KINDS.includes(file.type)) return this.refuse(`${file.name} is not a PNG, JPEG or WebP picture.`);
    return this.show(file, file.name);
  }

  refuse(message) {
    this.input.value = "";
    this.report(message);
  }

  async show(file, name) {
    const image = byId("picture-preview");
    const address = URL.createObjectURL(file);
    const probe = new Image();
    probe.src = address;
    try {
      await probe.decode();
    } catch {
      URL.revokeObjectURL(address);
      return this.refuse(`${name} is damaged, or not a picture this browser can read.`);
    }
    if (image.src) URL.revokeObjectURL(image.src);
    image.src = address;
    image.alt = `Preview of ${name}, cropped as the model sees it`;
    this.file = file;
    document.dispatchEvent(new CustomEvent("picture", { detail: address }));
    this.report("");
    byId("drop").classList.add("filled");
    byId("picture-name").textContent = name;
    byId("picture-size").textContent = `${probe.naturalWidth} × ${probe.naturalHeight}`;
  }
}

// The first frame of a video as a PNG file: what stands in where the picture itself is not at hand.
export async function firstFrame(blob) {
  const canvas = await frameOf(blob, 0);
  const still = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([still], "first-frame.png", { type: "image/png" });
}

// A canvas with the frame at a share 0..1 of a video.
export async function frameOf(blob, share) {
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  video.src = URL.createObjectURL(blob);
  try {
    await happened(video, "loadeddata");
    if (share > 0) {
      const sought = happened(video, "seeked");
      video.currentTime = share * video.duration;
      await sought;
    }
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    return canvas;
  } finally {
    URL.revokeObjectURL(video.src);
    video.removeAttribute("src");
    video.load(); // lets go of the decoder at once: phones have few
  }
}

// Resolves at the next event of that name; rejects where the video turns out to be unplayable.
export function happened(video, name) {
  return new Promise((resolve, reject) => {
    video.addEventListener(name, resolve, { once: true });
    video.addEventListener("error", () => reject(new Error("the video cannot be played")), { once: true });
  });
}
