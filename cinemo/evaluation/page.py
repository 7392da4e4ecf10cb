"""The parts of a one-page HTML report: everything is inside the page, pictures and videos as data URIs."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cinemo import storage
from cinemo.evaluation.figures import data_uri, figure_png, image_png
from cinemo.media.mp4 import write_video

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --muted: #667581; --line: #e3e8ec; --accent: #0b7285; --wash: #f5f8f9; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  color: var(--ink); background: white; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.02em; }
h2 { font-size: 21px; margin: 52px 0 6px; padding-top: 20px; border-top: 1px solid var(--line); }
p { margin: 6px 0 14px; max-width: 72ch; }
.lead, .note, figcaption, dt { color: var(--muted); }
.note, figcaption { font-size: 14px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 24px 0 0; }
dl div { background: var(--wash); border-radius: 8px; padding: 12px 16px; }
dt { font-size: 13px; } dd { margin: 2px 0 0; font-size: 20px; font-weight: 600; white-space: nowrap; }
figure { margin: 0; } figure.narrow { max-width: 560px; } figure img { width: 100%; height: auto; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 28px; }
.pair { margin-top: 16px; } @media (max-width: 600px) { table { display: block; overflow-x: auto; } }
table { border-collapse: collapse; width: 100%; font-size: 15px; margin-top: 12px; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-size: 13px; font-weight: 600; color: var(--muted); } td.number { font-variant-numeric: tabular-nums; }
.samples { table-layout: fixed; border-spacing: 0; margin: 12px -8px 0; width: calc(100% + 16px); }
.samples td, .samples th { padding: 6px 8px; border: 0; }
video, .samples img { width: 100%; display: block; border-radius: 6px; background: var(--line); }
code { font: 13.5px/1.5 ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; background: var(--wash);
  padding: 2px 5px; border-radius: 4px; overflow-wrap: anywhere; }
pre { font: 13px/1.5 ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; background: var(--wash);
  padding: 12px 16px; border-radius: 8px; overflow-x: auto; } summary { cursor: pointer; }
"""


def section(title: str, text: str) -> str:
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>"


def tiles(values: Mapping[str, str]) -> str:
    cells = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in values.items())
    return f"<dl>{''.join(cells)}</dl>"


def pair(*charts: tuple[Figure, str]) -> str:
    return f'<div class="pair">{"".join(chart(*each) for each in charts)}</div>'


def chart(figure: Figure, caption: str, narrow: bool = False) -> str:
    """A figure as wide as the page, or half as wide."""
    text = html.escape(caption)
    image = f'<img src="{data_uri(figure_png(figure), "image/png")}" alt="{text}">'
    kind = ' class="narrow"' if narrow else ""
    return f"<figure{kind}>{image}<figcaption>{text}</figcaption></figure>"


def picture(image: Image.Image) -> str:
    return f'<figure><img src="{data_uri(image_png(image), "image/png")}" alt="contact sheet"></figure>'


def video(content: bytes) -> str:
    return f'<video src="{data_uri(content, "video/mp4")}" autoplay loop muted playsinline></video>'


def mp4_bytes(frames_FHWC: np.ndarray, fps: float = 8) -> bytes:
    """The video of uint8 RGB frames."""
    with tempfile.TemporaryDirectory() as scratch:
        write_video(Path(scratch) / "video.mp4", frames_FHWC, fps)
        return (Path(scratch) / "video.mp4").read_bytes()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` are HTML; the header is text."""
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in header)
    lines = "".join("<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"


def code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def number(value: Any) -> str:
    """Three significant digits; four just below 1, where similarities differ in the last ones alone."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if 0.95 <= abs(value) < 1 else f"{value:.3g}"


def write_page(uri: str, title: str, body: Sequence[str], before: str | None = None) -> str:
    """Write a page and return it; where it is what was there ``before``, the file is left alone."""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    if page != before:
        storage.write_bytes(uri, page.encode())
    return page
