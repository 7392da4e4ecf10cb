// The settings inside an mp4 that this system made: the container's free keys (moov/udta/meta: keys and ilst).

const INSIDE = new Set(["moov", "udta", "meta", "ilst"]);

// Resolves to {name: text} of a Blob; empty where there is none.
export async function readMetadata(blob) {
  const view = new DataView(await blob.arrayBuffer());
  const found = { names: [], values: [] };
  walk(view, 0, view.byteLength, "", found);
  return Object.fromEntries(found.values.map(([index, text]) => [found.names[index - 1] ?? index, text]));
}

// Resolves to the settings as `animate` records them, or null for any other file.
export async function readSettings(blob) {
  try {
    const settings = JSON.parse((await readMetadata(blob)).comment);
    return typeof settings?.prompt === "string" ? settings : null;
  } catch {
    return null;
  }
}

function walk(view, start, end, parent, found) {
  for (let at = start; at + 8 <= end; ) {
    const size = view.getUint32(at);
    const kind = fourLetters(view, at + 4);
    const stop = size === 0 ? end : at + size;
    if (size === 1 || stop < at + 8 || stop > end) return; // 64-bit sizes are of files far larger than ours
    if (parent === "ilst") readValue(view, at, stop, found);
    else if (kind === "keys") readNames(view, at + 16, stop, found);
    // QuickTime's meta is a plain box, ISO's has four more bytes (version and flags) before its first child.
    else if (kind === "meta") walk(view, at + (fourLetters(view, at + 12) === "hdlr" ? 8 : 12), stop, kind, found);
    else if (INSIDE.has(kind)) walk(view, at + 8, stop, kind, found);
    at = stop;
  }
}

function readNames(view, start, end, found) {
  for (let at = start; at + 8 <= end && view.getUint32(at) >= 8; at += view.getUint32(at)) {
    found.names.push(text(view, at + 8, Math.min(end, at + view.getUint32(at))));
  }
}

// An item is named by its place in keys and holds one data box: size, "data", type, locale, bytes.
function readValue(view, at, stop, found) {
  if (fourLetters(view, at + 12) === "data") found.values.push([view.getUint32(at + 4), text(view, at + 24, stop)]);
}

const text = (view, from, to) => new TextDecoder().decode(new Uint8Array(view.buffer, from, to - from));
const fourLetters = (view, at) => (at + 4 <= view.byteLength ? text(view, at, at + 4) : "");
