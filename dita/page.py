"""Pieces of an HTML page that stands alone: no script, no request; light and dark, phone and paper."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave

# drawn colour -> CSS variable: one SVG serves light and dark; Okabe & Ito (2008) for colour-blind eyes
INK, GRID, BLUE, ORANGE, GREEN = "#010203", "#010204", "#0072b2", "#d55e00", "#009e73"
CSS_COLOURS = {INK: "var(--ink)", GRID: "var(--grid)", BLUE: "var(--a)", ORANGE: "var(--b)", GREEN: "var(--c)"}
RC: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "dita", "font.size": 8, "axes.axisbelow": True, "axes.grid": True,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID, "legend.frameon": False,
}  # fmt: skip
Draw = Callable[[Axes], None]


class Html(str):
    """Text that is escaped already."""


def write_page(target: Path, title: str, body: str) -> None:
    """Write a page in one step."""
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(PAGE.substitute(title=escape(title), body=body), encoding="utf-8")
    partial.replace(target)


def section(title: str, *parts: str) -> str:
    """Put parts under a heading."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows under a head; cells are escaped unless they are Html."""

    def line(tag: str, cells: Sequence[str]) -> str:
        inside = (c if isinstance(c, Html) else escape(c) for c in cells)
        return f"<tr>{''.join(f'<{tag}>{c}</{tag}>' for c in inside)}</tr>"

    return f'<div class="scroll"><table>{line("th", head)}{"".join(line("td", row) for row in rows)}</table></div>'


def grid(cells: Sequence[str]) -> str:
    """Put cells beside each other as far as there is room."""
    return f'<div class="grid">{"".join(cells)}</div>'


def plot(x: str, y: str, draw: Draw, height: float = 2.4) -> str:
    """Draw axes as inline SVG in the page's colours."""
    figure = Figure(figsize=(4.3, height), layout="constrained")
    ax = figure.subplots()
    draw(ax)
    ax.set(xlabel=x, ylabel=y)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])  # the same ids stand in every plot
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, variable)
    return f'<figure role="img" aria-label="{escape(f"{y} over {x}")}">{svg}</figure>'


def strip(frames: Sequence[np.ndarray], captions: Sequence[str]) -> str:
    """Show pictures in a row."""
    figures = ""
    for frame, caption in zip(frames, captions, strict=True):
        jpeg = io.BytesIO()
        imsave(jpeg, frame, format="jpeg", pil_kwargs={"quality": 80})
        image = f'<img alt="{escape(caption)}" src="{uri("image/jpeg", jpeg.getvalue())}">'
        figures += f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
    return f'<div class="strip">{figures}</div>'


def escape(text: object) -> str:
    """Escape text for HTML."""
    return html.escape(str(text))


def uri(kind: str, data: bytes) -> str:
    """Return a data: URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5d6872; --paper: #ffffff; --card: #f3f5f7; --grid: #dfe3e7;
  --a: #0072b2; --b: #d55e00; --c: #00805e }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa6b2; --paper: #14181c; --card: #1e242a;
  --grid: #333b43; --a: #56b4e9; --b: #f08c3c; --c: #2fc598 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1.2rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.8rem } h2 { margin: 2.4rem 0 .6rem; font-size: 1.25rem }
h3 { margin: 1rem 0 .4rem; font-size: 1rem } header p { margin: 0 0 1rem; color: var(--soft) }
code { font-size: .85em } figure { margin: 0 } svg { display: block; width: 100%; height: auto }
.tiles, .grid { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr)) }
.grid { gap: .8rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)) }
.grid > * { min-width: 0 } .grid th, .grid td { white-space: normal }
.tiles div, article, .missing { background: var(--card); border-radius: .5rem; padding: .7rem .9rem }
.tiles small, .tiles span { display: block; color: var(--soft); font-size: .85rem }
.tiles strong { display: block; font-size: 1.7rem; line-height: 1.3 }
.missing { border-left: .3rem solid var(--b) }
.scroll { overflow-x: auto; margin: .6rem 0 } table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: .25rem 1.1rem .25rem 0; border-bottom: 1px solid var(--grid); vertical-align: top;
  font-variant-numeric: tabular-nums; white-space: nowrap; overflow-wrap: normal }
th { color: var(--soft); font-weight: 600 }
.interval { position: relative; display: inline-block; width: 9rem; height: .8rem; background: var(--grid);
  border-radius: .2rem; print-color-adjust: exact }
.interval i { position: absolute; height: 100%; background: var(--a); opacity: .55; border-radius: .2rem }
.interval b { position: absolute; top: -.15rem; width: .2rem; margin-left: -.1rem; height: 1.1rem;
  background: var(--ink) }
.wide { max-width: 100%; border-radius: .4rem }
article { margin: .8rem 0; border-left: .3rem solid var(--c) } article.failure { border-left-color: var(--b) }
article h3 { margin-top: 0 } .film { display: flex; gap: .8rem; flex-wrap: wrap }
.film video { width: 12rem; max-width: 100%; border-radius: .3rem }
.strip { flex: 1 1 16rem; display: grid; gap: .3rem; grid-template-columns: repeat(auto-fit, minmax(5.5rem, 1fr)) }
.strip img { display: block; width: 100%; border-radius: .3rem }
figcaption { color: var(--soft); font-size: .75rem }
@media (max-width: 40rem) { th, td { white-space: normal; padding-right: .6rem } .interval { display: none } }
@media print { :root { font-size: 12px } body { max-width: none } video { display: none }
  article, figure, tr { break-inside: avoid } h2, h3 { break-after: avoid } }
</style></head>
<body>
$body
</body></html>
""")
