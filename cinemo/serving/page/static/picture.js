// Choosing a picture: by the file dialogue, by dropping it anywhere on the page, or by pasting it. What the server would
// refuse is refused here, before anything is sent.

import { byId } from "./dom.js";
import { readSettings } from "./metadata.js";

const FORM_BYTES = 64 * 1024; // of a request beside its picture

export class PictureField {
  file = null;
  limits = null; // what the server takes; see schema.PictureLimits
  state = ""; // "checking", "good" or "bad"

  // report(message): at every change of the state; "" where nothing is wrong. onSettings(settings): a video of this
  // system was dropped, with its settings inside.
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

  // A video made here gives its settings and its first frame.
  async take(file) {
    if (!file.type.startsWith("video/")) return this.show(file, file.name || "The picture");
    const settings = await readSettings(file);
    if (!settings) return this.refuse(`${file.name} is a video that was not made here. Choose a picture.`);
    await this.show(await firstFrame(file), `First frame of ${file.name}`);
    return this.onSettings(settings);
  }

  // Show the file as it will be cropped; resolves to whether it can be used.
  async show(file, name) {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    this.state = "checking";
    this.report("");
    let checked;
    try {
      checked = await checkPicture(file, this.limits, name);
    } catch (fault) {
      if (turn === this.turn) this.refuse(fault.message);
      return false;
    }
    if (turn !== this.turn) return false; // another one was chosen meanwhile
    const image = byId("picture-preview");
    if (image.src) URL.revokeObjectURL(image.src);
    image.src = checked.address;
    image.alt = `Preview of ${name}, cropped as the model sees it`;
    this.file = file;
    document.dispatchEvent(new CustomEvent("picture", { detail: checked.address }));
    byId("drop").classList.add("filled");
    byId("picture-name").textContent = name;
    byId("picture-size").textContent = `${checked.width} × ${checked.height}`;
    this.state = "good";
    this.report("");
    return true;
  }

  // Nothing is left of the one before: it is not what was meant.
  refuse(message) {
    this.input.value = "";
    this.file = null;
    byId("drop").classList.remove("filled");
    byId("picture-preview").removeAttribute("src");
    this.state = "bad";
    this.report(message);
  }
}

// Resolves to {address, width, height}; rejects with an Error whose message is a sentence for a person.
export async function checkPicture(file, limits, name = file.name) {
  const megabytes = (bytes) => `${Number((bytes / 2 ** 20).toPrecision(3))}\u00a0MB`;
  const most = limits ? limits.bytes - FORM_BYTES : Infinity;
  if (!file.size) throw new Error(`${name} is empty.`);
  if (file.size > most) {
    throw new Error(`${name} is too large: ${megabytes(file.size)}, at most ${megabytes(most)} can be sent. Make it smaller first.`);
  }
  const wrong = wrongKind(String.fromCharCode(...new Uint8Array(await file.slice(0, 4096).arrayBuffer())));
  if (wrong) throw new Error(`${name} ${wrong}. Choose a PNG, JPEG or WebP picture.`);
  const damaged = `${name} is damaged: not all of it can be read. Save it again, or choose another picture.`;
  const address = URL.createObjectURL(file);
  try {
    // Its size is known before its pixels are read, which a hostile or huge one makes costly.
    const probe = new Image();
    probe.src = address;
    await new Promise((resolve, reject) => {
      probe.onload = resolve;
      probe.onerror = () => reject(new Error(damaged));
    });
    const { naturalWidth: width, naturalHeight: height } = probe;
    if (limits && width * height > limits.pixels) {
      const many = `${width} × ${height} are ${(width * height / 1e6).toFixed(1)} megapixels, at most ${limits.pixels / 1e6} are taken`;
      throw new Error(`${name} has too many pixels: ${many}. Make it smaller first.`);
    }
    // Unlike Image.decode, this does not take half a picture for a whole one.
    const bitmap = await createImageBitmap(file).catch(() => Promise.reject(new Error(damaged)));
    bitmap.close();
    return { address, width, height };
  } catch (fault) {
    URL.revokeObjectURL(address);
    throw fault;
  }
}

// By its first letters, as the server recognises it: file names and types are often wrong, and do no harm.
function wrongKind(start) {
  const animated = "is animated; one picture is needed";
  if (start.startsWith("\x89PNG\r\n\x1a\n")) return start.split("IDAT")[0].includes("acTL") ? animated : "";
  if (start.startsWith("\xff\xd8\xff")) return "";
  if (start.startsWith("RIFF") && start.slice(8, 12) === "WEBP") {
    return start.slice(12, 16) === "VP8X" && start.charCodeAt(20) & 2 ? animated : "";
  }
  if (start.slice(4, 8) === "ftyp") return "is a kind of picture (HEIC or AVIF) that cannot be read here";
  if (start.startsWith("GIF8")) return "is a GIF";
  return "is not a picture that can be read here";
}

// The first frame of a video as a PNG file: what stands in where the picture itself is not at hand.
export async function firstFrame(blob) {
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  video.src = URL.createObjectURL(blob);
  try {
    await happened(video, "loadeddata");
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    const still = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    return new File([still], "first-frame.png", { type: "image/png" });
  } finally {
    letGo(video);
  }
}

// Ends a video of a blob: address, and its decoder at once: phones have few.
export function letGo(video) {
  const address = video.src;
  video.pause();
  video.removeAttribute("src");
  video.load();
  URL.revokeObjectURL(address);
}

// Resolves at the next event of that name; rejects where the video turns out to be unplayable.
export function happened(video, name) {
  return new Promise((resolve, reject) => {
    video.addEventListener(name, resolve, { once: true });
    video.addEventListener("error", () => reject(new Error("the video cannot be played")), { once: true });
  });
}
