// The page: the form on the left, what it makes on the right, what was made before below. It speaks the public API.

import * as api from "./api.js";
import { announce, byId, calm, make } from "./dom.js";
import { cutOf } from "./facts.js";
import { History } from "./history.js";
import { ControlFields } from "./controls.js";
import { PictureField } from "./picture.js";
import { drawSeed } from "./seed.js";
import { Stage } from "./stage.js";

const form = byId("form");
const button = byId("animate");
const note = byId("form-note");

const STALE = new Set(["unknown_field", "model_not_found"]);

let model = null;
let sending = false;

const controls = new ControlFields();
const picture = new PictureField({
  report: (message) => {
    tellField("input_reference", message);
    if (message) announce(message);
    allow();
  },
  onSettings: (settings) => {
    fill(settings);
    tell("The settings of that video are filled in, with its first frame as the picture.");
  },
});
const stage = new Stage({ reuse, remix, changed, removed: () => history.started(), shown });
const history = new History({ show: (id) => look([id]), compare: (id) => look([stage.ids[0], id]) });

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  await submit();
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
form.addEventListener("input", (event) => event.target.id && tellField(event.target.id, ""));
form.addEventListener("refused", (event) => tellField(event.target.id, event.detail)); // a picture, before it is sent
byId("forget-key").addEventListener("click", () => {
  api.key.set("");
  location.reload();
});
window.addEventListener("hashchange", () => stage.show(fromAddress()));

// While a picture cannot be used, or is being looked at, nothing can be sent.
function allow() {
  button.disabled = !model || sending || ["checking", "bad"].includes(picture.state);
}

async function submit() {
  tell("");
  for (const name of ["input_reference", "prompt", ...controls.names]) tellField(name, "");
  if (button.disabled) return picture.input.focus();
  if (!picture.file) return fault({ param: "input_reference", message: "Choose a picture first." });
  const settings = { prompt: byId("prompt").value, ...await controls.whole(), previews: true };
  return sendAll(seeds(settings.seed).map((seed) => ({ ...settings, seed })), picture.file);
}

// One for each video that is wanted: the one that was entered, or one that is drawn, and those that follow it.
function seeds(entered) {
  const count = Number(byId("count").value);
  if (count === 1 || (entered && !/^\d+$/.test(entered))) return [entered];
  const first = entered ? Number(entered) : drawSeed();
  return Array.from({ length: count }, (_, at) => String(first + at));
}

// orders: settings of the videos that are still to be asked for; ids: of those that were.
async function sendAll(orders, file, ids = []) {
  sending = true;
  allow();
  const again = () => (ids.length ? sendAll(orders, file, ids) : submit());
  let cut = "";
  for (; orders.length; orders = orders.slice(1)) {
    const [settings] = orders;
    const made = await send((once) => api.create(bodyOf(settings, file), once), { note, fault, again });
    if (!made) break;
    ids = [...ids, made.id];
    stage.pictures.set(made.id, file);
    cut = cutOf(made);
  }
  sending = false;
  allow();
  if (!ids.length) return;
  stage.show(ids);
  announce(cut || (ids.length > 1 ? `${ids.length} sent` : "Sent"));
  if (cut && ids.length > 1) tell(cut); // a single one says so beside its settings
  if (matchMedia("(max-width: 899px)").matches) {
    byId("stage").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth", block: "start" });
  }
}

const entered = () => ({ prompt: byId("prompt").value, ...controls.values });

function bodyOf(settings, file) {
  const body = new FormData();
  for (const [name, value] of Object.entries(settings)) if (value !== "" || name === "prompt") body.append(name, value);
  body.append("input_reference", file, file.name || "picture");
  return body;
}

// The same pictures and settings with one change.
async function remix(video, change, form) {
  const made = await send((once) => api.remix(video.id, change, once), form);
  const sent = stage.pictures.get(video.id);
  if (made && sent) stage.pictures.set(made.id, sent);
  return made;
}

// request(idempotencyKey) asks for a job. Resolves to it, or to null where the fault has been shown in place: {note,
// fault?, again?}.
async function send(request, place) {
  const once = api.newIdempotencyKey();
  try {
    const video = await request(once).catch(async (error) => {
      if (error.status !== 0) throw error;
      await api.sleep(1500); // perhaps only the answer was lost: with the same key nothing is made twice
      return request(once);
    });
    place.note.replaceChildren();
    history.started();
    return video;
  } catch (error) {
    if (STALE.has(error.code)) refreshModel(); // another one is served since the page was opened
    if (error.status === 429) countDown(error, place);
    else if (place.fault) place.fault(error);
    else place.note.replaceChildren(make("p", {}, error.message));
    return null;
  }
}

// The server said when to come back: count down, then offer to try again.
function countDown(error, place) {
  let left = Math.max(1, Math.ceil(error.retryAfter));
  const again = make("button", { type: "button", className: "button" });
  const why = error.code === "queue_full" ? "The server is busy: " : "";
  place.note.replaceChildren(make("p", {}, `${why}${error.message}.`), again);
  const tick = () => {
    if (!again.isConnected) return;
    again.disabled = left > 0;
    again.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left-- > 0) setTimeout(tick, 1000);
  };
  again.addEventListener("click", () => (place.again ? place.again() : place.root.requestSubmit()));
  tick();
}

// An error body, beside the field that it is about.
function fault({ param, message }) {
  if (!byId(`${param}-error`)) return tell(message, "bad");
  tellField(param, sentence(message, param));
  const field = byId(param);
  const fold = field.closest("details");
  if (fold) fold.open = true;
  field.focus();
  return announce(message);
}

function tellField(name, message) {
  const place = byId(`${name}-error`);
  if (!place) return;
  place.textContent = message;
  place.hidden = !message;
  if (message) byId(name).setAttribute("aria-invalid", "true");
  else byId(name).removeAttribute("aria-invalid");
  if (name === "input_reference") byId("drop").classList.toggle("bad", Boolean(message));
}

function tell(message, kind = "") {
  note.replaceChildren(...(message ? [make("p", { className: kind }, message)] : []));
}

// "prompt: got 5000 characters" under the field "prompt" need not name it again.
function sentence(message, param) {
  const text = message.startsWith(`${param}: `) ? message.slice(param.length + 2) : message;
  const plain = text.replace(/^(String|Input) should/, "This should");
  return plain.charAt(0).toUpperCase() + plain.slice(1);
}

// The settings of an earlier video, and its pictures as they were sent.
async function reuse(video) {
  fill(video);
  form.scrollIntoView({ behavior: calm.matches ? "auto" : "smooth", block: "start" });
  byId("prompt").focus({ preventScroll: true });
  try {
    const others = (video.inputs ?? []).map(async (name) => [name, await api.picture(video.id, name)]);
    const file = await stage.pictureOf(video);
    const isFrame = file.name === "first-frame.png";
    if (!await picture.show(file, isFrame ? "First frame of that video" : file.name)) return;
    await controls.takePictures(Object.fromEntries(await Promise.all(others)));
    tell(isFrame ? "Filled in. The picture itself is gone; the video's first frame stands in for it." : "Settings and picture are filled in.");
  } catch {
    tell("The settings are filled in. Choose a picture.");
  }
}

function fill(settings) {
  if (settings.prompt !== undefined) byId("prompt").value = settings.prompt;
  controls.fill(settings);
  for (const name of ["prompt", ...controls.names]) tellField(name, "");
}

// What is on the stage is in the address, so that it can be kept, shared, and left with the back button.
const fromAddress = () => location.hash.slice(1).split("+").filter((id) => /^video_\w+$/.test(id)).slice(0, 4);

function look(ids) {
  stage.show(ids);
  byId("stage").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth", block: "start" });
}

function shown(ids) {
  const address = ids.length ? `#${ids.join("+")}` : location.pathname + location.search;
  if (fromAddress().join() !== ids.join()) window.history.pushState(null, "", address);
  history.mark(ids);
}

function changed(video) {
  history.changed(video);
  if (video.id !== stage.ids[0]) return;
  const ready = video.status === "completed" && document.hidden ? "Ready" : "";
  const state = video.status === "in_progress" ? `${video.progress} %` : ready;
  document.title = state ? `${state} · Cinemo` : "Cinemo";
}

document.addEventListener("visibilitychange", () => {
  if (document.title.startsWith("Ready")) document.title = "Cinemo";
});

// Resolves to true once a key was entered; several requests that are refused at once ask once.
let asking = null;
api.onKeyNeeded((refused) => {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-error").hidden = !refused;
    byId("key").value = "";
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      if (dialog.returnValue === "use") api.key.set(byId("key").value.trim());
      byId("forget-key").hidden = !api.key.get();
      resolve(dialog.returnValue === "use");
    }, { once: true });
  });
  return asking;
});

function setModel(known) {
  model = known;
  stage.model = model;
  const [width, height] = model.size.split("x").map(Number);
  document.documentElement.style.setProperty("--shape", `${width} / ${height}`);
  const length = `${model.frames} frames, ${Number(model.seconds)} s`;
  byId("model").textContent = `${model.id} · ${width} × ${height} · ${length}`;
  byId("toy").hidden = !model.toy;
  byId("toy-size").textContent = `${width} × ${height}`;
  picture.limits = model.picture_limits;
  controls.setModel(model);
  history.setModel(model);
}

// Another model may be served by now: its controls, with what was entered.
async function refreshModel() {
  try {
    const served = await api.model();
    if (served.digest === model.digest) return;
    const before = entered();
    setModel(served);
    fill(before);
  } catch {
    // The next answer of the server says what is wrong with it.
  }
}

document.addEventListener("visibilitychange", () => document.hidden || (model && refreshModel()));

// Until the server answers: a page that was opened while it starts comes to life by itself.
for (;;) {
  try {
    setModel(await api.model());
    break;
  } catch (error) {
    tell(`${error.message} Trying again …`, "bad");
    await api.sleep(error.status === 401 ? 60_000 : 3000);
  }
}
tell("");
byId("forget-key").hidden = !api.key.get();
allow();
stage.show(fromAddress());
history.refresh();
