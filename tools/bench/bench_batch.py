"""Batches of small graphs and single graphs of growing size, tiled and untiled: tiles must not make a small graph slower."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_data
import bench_step
import numpy as np
from bench_step import ONE_TILE, Options, Say

from dist_egnn.utils import memory

LADDER, DEGREE = (100, 300, 1000, 3000, 10_000, 30_000), 14.6  # nodes of single graphs, and their in-edges of a node
PROTEIN = 5, 855  # graphs, nodes of one
MOST, EDGES = 100, 400_000  # a case is repeated until its repetitions have seen so many edges, MOST times at most


@dataclass(frozen=True)
class Case:
    """Graphs of one kind; degree: in-edges of a node, about; make(seed): positions (N, 3) and radius of one graph."""

    name: str
    graphs: int
    nodes: int
    degree: float
    make: Callable[[int], tuple[np.ndarray, float]]


def _block(nodes: int, degree: float, seed: int) -> tuple[np.ndarray, float]:
    x = bench_data.block(nodes, seed)
    return x, bench_data.radius_for(x, degree)


def cases(graphs: int, nodes: int) -> list[Case]:
    """N-body: complete graphs; protein (synthetic): a chain cut off at 10 Å; single graphs of particles."""
    return [
        Case("nbody", graphs, nodes, nodes - 1, lambda seed: (bench_data.block(nodes, seed), math.inf)),
        Case("protein (synthetic)", *PROTEIN, 100, lambda seed: (bench_data.chain(PROTEIN[1], seed), 10.0)),
        *(Case(f"block {n}", 1, n, DEGREE, partial(_block, n, DEGREE)) for n in LADDER),
    ]


def options_for(case: Case, options: Options) -> Options:
    """The options with the size of a case."""
    return replace(options, nodes=case.graphs * case.nodes, degree=case.degree)


def fitting(case: Case, options: Options) -> tuple[Case, str]:
    """The case with as many graphs as fit untiled, halved until they do, and a line that says so; Failure if none fits."""

    def needed(one: Case) -> float:
        return bench_step.memory_needed("untiled", replace(options_for(one, options), tile=ONE_TILE))

    there, fits = memory.available_memory("cpu"), case
    while fits.graphs > 1 and needed(fits) > there:
        fits = replace(fits, graphs=fits.graphs // 2)
    memory.require_memory(needed(fits), "cpu", f"'{case.name}', untiled,", "lower --nodes, --hidden or --layers")
    if fits.graphs == case.graphs:
        return fits, ""
    return fits, (
        f"{case.name}: {fits.graphs} of {case.graphs} graphs: untiled, all take about {needed(case) / 1e9:.1f} GB "
        f"and {there / 1e9:.1f} GB are free"
    )


def run(graphs: int, nodes: int, options: Options, say: Say = lambda line: None) -> dict[str, Any]:
    """Time every case tiled and untiled, taking turns in a process of its own; say(line) as each ends.

    Returns the settings, ``notes`` (what was run smaller than asked, and why) and rows: the case, its graphs, nodes and edges
    (all graphs), repeats, ``tiled`` and ``untiled`` (medians forward_s and step_s, every repetition in …_all_s, tile),
    forward_ratio and step_ratio (medians of untiled/tiled turn by turn), and ``difference`` as bench_step.run gives it.
    """
    wanted = cases(graphs, nodes)
    for case in wanted:
        bench_step.check(options_for(replace(case, graphs=1), options), peers=False)
    fits = [fitting(case, options) for case in wanted]
    rows = []
    for case, _ in fits:
        with tempfile.TemporaryDirectory(prefix="dist_egnn-") as name:
            rows.append(row := _row(case, options, Path(name)))
        say(f"{case.name}: untiled/tiled forward {row['forward_ratio']:.2f}, step {row['step_ratio']:.2f}")
    kept = ("hidden", "layers", "virtual_nodes", "threads", "engine")
    return {**{key: asdict(options)[key] for key in kept}, "notes": [note for _, note in fits if note], "rows": rows}


def _row(case: Case, options: Options, folder: Path) -> dict[str, Any]:
    edges = bench_step.write_graphs(map(case.make, range(case.graphs)), folder)
    repeats = max(options.repeats, min(MOST, EDGES // max(edges, 1)))
    chosen = replace(options_for(case, options), repeats=repeats)
    found = bench_step.spawn({"ours": chosen, "untiled": replace(chosen, tile=ONE_TILE)}, folder)
    keys = ("forward_s", "step_s", "forward_all_s", "step_all_s", "tile")
    tiled, untiled = ({key: found[name][key] for key in keys} for name in ("ours", "untiled"))
    return {
        **{"case": case.name, "graphs": case.graphs, "nodes": chosen.nodes, "edges": edges, "repeats": repeats},
        **{"tiled": tiled, "untiled": untiled},
        **{f"{key}_ratio": _ratio(untiled[f"{key}_all_s"], tiled[f"{key}_all_s"]) for key in ("forward", "step")},
        "difference": bench_step.differences(folder, ["untiled"])["untiled"],
    }


def _ratio(untiled: list[float], tiled: list[float]) -> float:
    """Neighbours in time are compared: a machine that is slow for a while is so for both."""
    return statistics.median(a / b for a, b in zip(untiled, tiled, strict=True))
