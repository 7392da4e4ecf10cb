// Elements in one expression: make("p", {className: "note"}, "text", child).

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export const byId = (id) => document.getElementById(id);

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

// For ears only: what has just happened.
export function announce(text) {
  const place = byId("announcer");
  if (place.textContent !== text) place.textContent = text;
}

// A "?" that shows an explanation and hides it again: its button and its paragraph.
export function help(about, id, text = "") {
  const paragraph = make("p", { className: "note explanation", id, hidden: true }, text);
  const button = make("button", { type: "button", className: "help", title: "What is this?" }, "?");
  button.setAttribute("aria-label", `What is this: ${about}`);
  button.setAttribute("aria-expanded", "false");
  button.setAttribute("aria-controls", id);
  button.addEventListener("click", () => {
    paragraph.hidden = !paragraph.hidden;
    button.setAttribute("aria-expanded", String(!paragraph.hidden));
  });
  return [button, paragraph];
}

export const calm = matchMedia("(prefers-reduced-motion: reduce)");
