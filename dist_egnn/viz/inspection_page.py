"""The HTML pages of `distegnn inspect`: the tables of a trajectories file or a store, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..data.store import Store
from ..evaluate.inspection import Inspection
from . import html_page, plots
from .html_report import node_parts

Tables = Sequence[tuple[str, list[str], list[list[Any]]]]


def _sections(tables: Tables) -> list[str]:
    return [f"<section><h2>{escape(title)}</h2>\n{html_page.table(header, rows)}\n" for title, header, rows in tables]


def write_file(out: Path, found: Inspection, tables: Tables, notes: Sequence[str]) -> None:
    """The page of a trajectories file. tables: of its trajectories, of neighbours and, if frames suffice, of errors."""
    file, k = found.file, found.numbers[0]
    sections = _sections(tables)
    last = file[k].frames - 1
    clouds = {f"frame {t}": file.position(k, t) for t in sorted({0, last})}
    caption = f"Positions. Trajectory {k}, {file[k].nodes:,} nodes; at most {plots.MAX_POINTS:,} are drawn."
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    sections[0] += f"<ul>{listed}</ul>{html_page.pictures(html_page.figure(caption, plots.clouds, clouds))}"
    caption = (
        "Histogram of the neighbours of a node. One line for each radius; " + f"{len(found.degrees[0][1]):,} nodes."
    )
    counts = {f"radius {radius:.3g}": degrees for radius, degrees in found.degrees}
    sections[1] += html_page.pictures(html_page.figure(caption, plots.degrees, counts))
    if len(tables) > 2:
        caption = "Mean squared error of predictions by horizon. Static: x; linear: constant velocity; ballistic: with gravity."
        words = "horizon [frames]", "mean squared error"
        sections[2] += html_page.pictures(
            html_page.figure(caption, plots.curves, found.horizons, found.errors, {}, *words)
        )
    html_page.write(out, f"{file.path}", "".join(f"{section}</section>\n" for section in sections))


def write_store(out: Path, store: Store, tables: Tables) -> None:
    """The page of a store, with the parts and the neighbours of its middle snapshot."""
    number = len(store.snapshots) // 2
    graph = store.whole(number, exchange=store.parts > 1)
    x, degrees = graph.ndata["x"].numpy(), graph.in_degrees().numpy()
    caption = f"Nodes, coloured by part. Snapshot {number} of {len(store.snapshots):,}."
    shown = [html_page.figure(caption, plots.parts, x, node_parts(store, number))]
    caption = (
        f"Histogram of the neighbours of a node. Snapshot {number}, {len(x):,} nodes, edges between parts included."
    )
    shown.append(html_page.figure(caption, plots.degrees, {f"radius {store.inputs['radius']:g}": degrees}))
    sections = _sections(tables)
    sections[0] += html_page.pictures(*shown)
    html_page.write(out, f"{store.path}", "".join(f"{section}</section>\n" for section in sections))
