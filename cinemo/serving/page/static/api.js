// The public API: requests with this tab's key, faults as words, and a job's changes as a stream or by asking.

const KEY = "cinemo-key";
export const FINAL = new Set(["completed", "failed", "cancelled"]);

// What went wrong, as the server's error body says it. status 0: no answer came.
export class Fault extends Error {
  constructor(status, { code, message, param }, retryAfter = 0) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

let askForKey = async () => false;

// ask(refused) resolves to true once the person has entered a key; refused: the last one was not accepted.
export function onKeyNeeded(ask) {
  askForKey = ask;
}

// In sessionStorage alone: the key leaves with the tab.
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function request(path, options = {}) {
  const used = key.get();
  const headers = new Headers(options.headers);
  if (used) headers.set("Authorization", `Bearer ${used}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault(0, { code: "unreachable", message: "The server cannot be reached." });
  }
  if (answer.ok) return answer;
  const fault = await faultOf(answer);
  // Another request of this tab may have asked for the key meanwhile.
  if (answer.status === 401 && (key.get() !== used || (await askForKey(Boolean(used))))) return request(path, options);
  throw fault;
}

async function faultOf(answer) {
  const wait = Number(answer.headers.get("Retry-After"));
  let error = { code: "refused", message: `The server answered ${answer.status}.` };
  try {
    error = (await answer.json()).error ?? error;
  } catch {
    // Not the server's own body: a proxy's page, perhaps. Its status says enough.
  }
  return new Fault(answer.status, error, Number.isFinite(wait) ? wait : 0);
}

const json = async (path, options) => (await request(path, options)).json();
const at = (id) => `v1/videos/${encodeURIComponent(id)}`;

export const model = async () => (await json("v1/models")).data[0];
export const video = (id, signal) => json(at(id), { signal });
export const cancel = (id) => json(`${at(id)}/cancel`, { method: "POST" });
export const remove = (id) => json(at(id), { method: "DELETE" });
export const page = (after, limit) =>
  json(`v1/videos?limit=${limit}${after ? `&after=${encodeURIComponent(after)}` : ""}`);

// The Idempotency-Key makes sending the same form again (after a lost answer) safe.
export const create = (form, once) =>
  json("v1/videos", { method: "POST", body: form, headers: { "Idempotency-Key": once } });

// A video of the same pictures and settings, changed by those given; the server has the pictures.
export const remix = (id, change, once) =>
  json(`${at(id)}/remix`, {
    method: "POST",
    body: JSON.stringify(change),
    headers: { "Content-Type": "application/json", "Idempotency-Key": once },
  });

export function newIdempotencyKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const KEPT = 32;
const contents = new Map();

// A download as a File, under the name that the server has for it (RFC 6266).
async function file(path) {
  const answer = await request(path);
  const content = await answer.blob();
  const told = answer.headers.get("Content-Disposition") ?? "";
  const encoded = told.match(/filename\*=UTF-8''([^;]+)/)?.[1];
  const name = encoded ? decodeURIComponent(encoded) : told.match(/filename="([^"]+)"/)?.[1];
  return new File([content], name ?? "download", { type: content.type });
}

export const thumbnail = (id) => file(`${at(id)}/content?variant=thumbnail`);
export const gif = (id) => file(`${at(id)}/content?variant=gif`);
// The picture that a video was made of, every pixel as it was sent; or one of those beside it.
export const picture = (id, name = "input_reference") => file(`${at(id)}/input?name=${encodeURIComponent(name)}`);

// The mp4. Fetched, because an address in <video src> would carry no key; the last few are kept.
export function content(id) {
  const kept = contents.get(id) ?? file(`${at(id)}/content`);
  contents.delete(id);
  contents.set(id, kept);
  kept.catch(() => contents.delete(id));
  if (contents.size > KEPT) contents.delete(contents.keys().next().value);
  return kept;
}

// Milliseconds. The server sends a comment every 15 s: this is a dead connection, or a proxy that keeps all back.
const SILENCE = 40000;
let streams = 0;
let streaming = true;

// Yields {video} at every change until it is final, {preview} where a video shows how it will look, and {lost: Fault}
// while the server cannot be asked.
// A browser opens six connections to a server, for all tabs together: so one stream a tab, and none in a hidden one.
export async function* changes(id, signal) {
  let pause = 500;
  while (!signal.aborted) {
    try {
      if (streaming && streams === 0 && !document.hidden) {
        for await (const changed of stream(id, signal)) {
          pause = 500;
          const isPreview = changed.object === "video.preview";
          yield isPreview ? { preview: changed } : { video: changed };
          if (FINAL.has(changed.status)) return;
        }
      } else {
        const changed = await video(id, signal);
        pause = document.hidden ? 3000 : 1000;
        yield { video: changed };
        if (FINAL.has(changed.status)) return;
      }
    } catch (fault) {
      if (signal.aborted) return;
      if (!(fault instanceof Fault) || (fault.status >= 400 && fault.status < 500)) throw fault;
      pause = Math.min(2 * pause, 5000);
      yield { lost: fault };
    }
    await sleep(pause, signal);
  }
}

async function* stream(id, signal) {
  const leaving = new AbortController();
  let silent = false;
  let timer;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => ((silent = true), leaving.abort()), SILENCE);
  };
  heard();
  const leave = () => (signal.aborted || document.hidden) && leaving.abort();
  signal.addEventListener("abort", leave);
  document.addEventListener("visibilitychange", leave);
  streams += 1;
  try {
    const answer = await request(`${at(id)}/events`, { signal: leaving.signal });
    for await (const data of events(answer.body.pipeThrough(new TextDecoderStream()).getReader(), heard)) {
      const changed = JSON.parse(data);
      if (changed.deleted) throw new Fault(404, { code: "video_not_found", message: "This video has been deleted." });
      yield changed;
    }
  } catch (error) {
    if (signal.aborted) throw error;
    if (error.code === "video_not_found") throw error;
    // No such stream here, too many of them, or something between that keeps it back: ask instead.
    if (error.status >= 400 || silent) streaming = false;
    else if (error instanceof Fault) throw error;
    else if (!leaving.signal.aborted) throw new Fault(0, { code: "unreachable", message: "The connection was lost." });
  } finally {
    streams -= 1;
    clearTimeout(timer);
    leaving.abort();
    signal.removeEventListener("abort", leave);
    document.removeEventListener("visibilitychange", leave);
  }
}

// The data of each server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html).
async function* events(reader, heard) {
  let rest = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    heard();
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

export function sleep(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
