"""Self-contained HTML pages, without scripts or external resources: their style, tables and pictures."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from ..errors import Failure
from ..utils.filesystem import lock_output, write_atomically
from . import plots

STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; break-inside: avoid; }
img { width: 100%; max-width: 38rem; height: auto; }
figcaption, .left-out { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
pre { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; }
@media print { .pictures { grid-template-columns: 1fr 1fr; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; } pre { background: none; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser loads nothing


def figure(caption: str, panel: Callable[..., None], *arguments: object) -> str:
    """A panel of plots.py; arguments: the panel's. The first sentence of the caption describes the picture."""
    data = base64.b64encode(plots.panel_png(panel, *arguments)).decode()
    width, height = (round(side * plots.DPI) for side in plots.SIZE)
    alt = escape(caption.partition(". ")[0])
    image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{alt}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def pictures(*shown: str) -> str:
    return f'<div class="pictures">{"".join(shown)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def check_name(out: Path) -> None:
    """Raise Failure unless the file is called .html."""
    if out.suffix != ".html":
        raise Failure(f"--out {out}: must end in .html")


def write(out: Path, title: str, body: str, notes: Sequence[str] = ()) -> None:
    """Write or replace a page and print its size, then the notes."""
    name = escape(title)
    head = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n"
    )
    text = f"{head}{body}</body></html>\n"
    with lock_output(out, wait_s=30):
        write_atomically(out, text.encode())
    print(f"{out}: {text.count('<img ')} pictures, {len(text) / 1e6:.1f} MB", *notes, sep="\n")
