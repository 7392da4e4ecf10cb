// What is known of videos, in words: the facts of one, the differences of several.

import { make } from "./dom.js";

const LONG = 280; // letters of a prompt that a table shows

// inside: the element with what is in the file, or null.
export function factsOf(video, model, inside) {
  const rows = told([video], model).filter(([name]) => name !== "prompt").map(([name, title]) =>
    make("div", {}, make("dt", {}, title), make("dd", {}, said(video[name]))),
  );
  const box = make("div", { className: "facts" }, make("p", { className: "prompt" }, video.prompt));
  const cut = cutOf(video);
  if (cut) box.append(make("p", { className: "notice" }, cut));
  box.append(make("dl", {}, ...rows));
  if (inside) box.append(inside);
  if (video.expires_at) box.append(make("p", { className: "note" }, `Kept until ${when(video.expires_at)}.`));
  return box;
}

export function differencesOf(videos, model) {
  const rows = told(videos, model).map(([name, title]) => {
    const differs = new Set(videos.map((each) => String(each[name]))).size > 1;
    const marked = differs ? make("span", { className: "visually-hidden" }, " (differs)") : null;
    const cells = videos.map((each) => make("td", {}, said(each[name])));
    return make("tr", { className: differs ? "differs" : "" }, make("th", { scope: "row" }, title, marked), ...cells);
  });
  const head = ["Setting", ..."ABCD".slice(0, videos.length)].map((title) => make("th", { scope: "col" }, title));
  return make("table", { className: "differences" },
    make("caption", { className: "visually-hidden" }, "Settings of these videos; those that differ are marked"),
    make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

// What to say of a prompt that is longer than the model reads.
export function cutOf({ prompt_tokens: tokens }) {
  if (!tokens?.cut) return "";
  const share = Math.floor((100 * tokens.limit) / tokens.used);
  return `These words are too long for the model: it reads about the first ${share}\u00a0% of them, and the rest changes nothing. Say the most important things first.`;
}

export function insideFile(written) {
  const rows = written.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text)));
  const title = make("summary", {}, "Settings inside the file");
  const hint = make("p", { className: "note" }, "Drop the downloaded file on this page to get them back.");
  return make("details", { className: "inside" }, title, hint, make("dl", {}, ...rows));
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.ceil(seconds))}\u00a0s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)}\u00a0min`;
  return `${Math.round(seconds / 3600)}\u00a0h`;
}

export function when(seconds) {
  const date = new Date(1000 * seconds);
  const today = date.toDateString() === new Date().toDateString();
  const time = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  return today ? time : `${date.toLocaleDateString([], { weekday: "long", day: "numeric", month: "long" })}, ${time}`;
}

// [name, title] of the settings of some videos that are worth a line: of those that only programs ask for, what is not
// as usual.
function told(videos, model) {
  const controls = (model?.controls ?? []).filter(({ name, place, default: usual }) =>
    videos.some((video) => ![undefined, null, ""].includes(video[name])
      && (place !== "api" || String(video[name]) !== String(usual))));
  const own = controls.map(({ name, title }) => [name, title]);
  const some = (name, title) => (videos.some((video) => video[name]) ? [[name, title]] : []);
  const further = [...some("predicted_motion", "Expected motion (1 - SSIM)"), ...some("lora", "Adapter")];
  return [["prompt", "What happens"], ...own, ...further, ["model", "Model"]];
}

function said(value) {
  if (value === undefined || value === null) return "–";
  if (typeof value === "boolean") return value ? "on" : "off";
  if (value.mean !== undefined) return `${value.mean}; nine of ten videos: ${value.low} to ${value.high}`;
  const text = String(value);
  return text === "" ? "–" : text.length > LONG ? `${text.slice(0, LONG)} …` : text;
}
