"""Batches of small graphs and single graphs of growing size, tiled, untiled and by the torch engine."""

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
from bench_step import UNTILED, Log, Options

from dist_egnn.utils import memory

SINGLE_NODES, DEGREE = (100, 300, 1000, 3000, 10_000, 30_000), 14.6  # nodes of single graphs and their mean degree
PROTEIN = 5, 855  # graphs, nodes of each
MAX_REPEATS, EDGES = 100, 400_000  # a case is repeated until it has processed EDGES, at most MAX_REPEATS times


@dataclass(frozen=True)
class Case:
    """Graphs of one kind. degree: approximate in-edges of a node; make(seed): positions (N, 3) and radius of one graph."""

    name: str
    graphs: int
    nodes: int
    degree: float
    make: Callable[[int], tuple[np.ndarray, float]]


def _block(nodes: int, degree: float, seed: int) -> tuple[np.ndarray, float]:
    x = bench_data.block(nodes, seed)
    return x, bench_data.radius_for(x, degree)


def cases(graphs: int, nodes: int) -> list[Case]:
    """N-body: complete graphs; protein (synthetic): a chain with a radius of 10 Å; single graphs of particles."""
    return [
        Case("nbody", graphs, nodes, nodes - 1, lambda seed: (bench_data.block(nodes, seed), math.inf)),
        Case("protein (synthetic)", *PROTEIN, 100, lambda seed: (bench_data.chain(PROTEIN[1], seed), 10.0)),
        *(Case(f"block {n}", 1, n, DEGREE, partial(_block, n, DEGREE)) for n in SINGLE_NODES),
    ]


def options_for(case: Case, options: Options) -> Options:
    """The options with the nodes and the degree of a case."""
    return replace(options, nodes=case.graphs * case.nodes, degree=case.degree)


def reduce_to_memory(case: Case, options: Options) -> tuple[Case, str]:
    """The case with its graphs halved until they fit into memory untiled, and a note if that was needed.

    Raises Failure if a single graph does not fit.
    """

    def needed(one: Case) -> float:
        return bench_step.memory_needed("untiled", replace(options_for(one, options), tile=UNTILED))

    free, reduced = memory.available_memory("cpu"), case
    while reduced.graphs > 1 and needed(reduced) > free:
        reduced = replace(reduced, graphs=reduced.graphs // 2)
    remedy = "lower --nodes, --hidden or --layers"
    memory.require_memory(needed(reduced), "cpu", f"'{case.name}', untiled,", remedy)
    if reduced.graphs == case.graphs:
        return reduced, ""
    return reduced, (
        f"{case.name}: {reduced.graphs} of {case.graphs} graphs: untiled, all take about {needed(case) / 1e9:.1f} GB "
        f"and {free / 1e9:.1f} GB are free"
    )


def measure_batches(graphs: int, nodes: int, options: Options, log: Log = lambda line: None) -> dict[str, Any]:
    """Time every case tiled, untiled and by the torch engine, alternating in one process; log(line) after each.

    Returns the settings, ``notes`` (cases that were reduced) and ``rows``: the case, its graphs, nodes and edges (of all
    graphs), repeats, ``tiled``, ``untiled`` and ``torch`` (medians forward_s and step_s, every repetition in …_all_s,
    tile), forward_ratio, step_ratio, torch_forward_ratio and torch_step_ratio (medians of untiled/tiled and torch/tiled
    over the repetitions), and ``difference`` of the predictions
    (bench_step.differences).
    """
    requested = cases(graphs, nodes)
    for case in requested:
        bench_step.check_options(options_for(replace(case, graphs=1), options), peers=False)
    reduced = [reduce_to_memory(case, options) for case in requested]
    rows = []
    for case, _ in reduced:
        with tempfile.TemporaryDirectory(prefix="dist_egnn-") as name:
            rows.append(row := _measure_case(case, options, Path(name)))
        log(f"{case.name}: untiled/tiled step {row['step_ratio']:.2f}, torch/tiled {row['torch_step_ratio']:.2f}")
    keys = ("hidden", "layers", "virtual_nodes", "threads", "engine")
    settings = {key: asdict(options)[key] for key in keys}
    return {**settings, "notes": [note for _, note in reduced if note], "rows": rows}


def _measure_case(case: Case, options: Options, folder: Path) -> dict[str, Any]:
    edges = bench_step.write_graphs(map(case.make, range(case.graphs)), folder)
    repeats = max(options.repeats, min(MAX_REPEATS, EDGES // max(edges, 1)))
    sized = replace(options_for(case, options), repeats=repeats)
    timed = {"ours": sized, "untiled": replace(sized, tile=UNTILED), "torch": replace(sized, engine="torch")}
    measured = bench_step.measure_in_process(timed, folder)
    keys = ("forward_s", "step_s", "forward_all_s", "step_all_s", "tile")
    tiled, untiled, by_torch = ({key: measured[name][key] for key in keys} for name in timed)
    passes = ("forward", "step")
    return {
        **{"case": case.name, "graphs": case.graphs, "nodes": sized.nodes, "edges": edges, "repeats": repeats},
        **{"tiled": tiled, "untiled": untiled, "torch": by_torch},
        **{f"{key}_ratio": _ratio(untiled[f"{key}_all_s"], tiled[f"{key}_all_s"]) for key in passes},
        **{f"torch_{key}_ratio": _ratio(by_torch[f"{key}_all_s"], tiled[f"{key}_all_s"]) for key in passes},
        "difference": bench_step.differences(folder, ["untiled"])["untiled"],
    }


def _ratio(other: list[float], tiled: list[float]) -> float:
    """Consecutive repetitions are compared, so that a temporarily slow machine affects both."""
    return statistics.median(a / b for a, b in zip(other, tiled, strict=True))
