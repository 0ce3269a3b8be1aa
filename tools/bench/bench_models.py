"""Every model on two kinds of graphs: parameters, seconds, memory, and how far it is from equivariant."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_data
import bench_step
import numpy as np
from bench_step import Options, Say

from dist_egnn.errors import Failure

BODIES = 100  # nodes of an N-body graph, as in the recipe


def _cases(options: Options, graphs: int) -> Iterator[tuple[str, Options, list[tuple[np.ndarray, float]]]]:
    """Name, options with the size, positions (N, 3) and radius of each graph."""
    bodies = [(bench_data.block(BODIES, seed), math.inf) for seed in range(graphs)]
    yield f"{graphs} N-body graphs", replace(options, nodes=BODIES * graphs, degree=BODIES - 1), bodies
    x = bench_data.block(options.nodes)
    yield "fluid", options, [(x, bench_data.radius_for(x, options.degree))]


def run(options: Options, graphs: int, names: Sequence[str] | None, say: Say = lambda line: None) -> dict[str, Any]:
    """Measure the models of these names, or all, each in a process of its own; say(line) as each ends.

    Returns ``notes`` (models that were left out, and why, as one whose library is not installed) and cases, each with its name
    ``case``, ``nodes``, ``edges`` and ``models``: name → parameters, forward_s, step_s, peak_gb, equivariance_error and …_float64
    beside what bench_step.run gives. Raises Failure for an unknown name, or where none could be run.
    """
    from dist_egnn.models import network

    for name in names or ():
        network.model_class(name)
    bench_step.check(options, peers=False)
    notes: dict[str, str] = {}
    cases = []
    for case, sized, made in _cases(replace(options, full_size=True), graphs):
        bench_step.check(sized, peers=False)
        with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
            edges = bench_step.write_graphs(made, Path(folder))
            found = {}
            for name in names or network.MODELS:
                try:
                    found[name] = row = bench_step.spawn({name: replace(sized, model=name)}, Path(folder))[name]
                except Failure as failure:
                    notes[name] = f"{name} left out: {failure}"
                    say(notes[name])
                else:
                    say(f"{case}, {name}: forward {row['forward_s']:.3f} s, step {row['step_s']:.3f} s")
        cases.append({"case": case, "nodes": sized.nodes, "edges": edges, "models": found})
    if not any(case["models"] for case in cases):
        raise Failure("; ".join(notes.values()))
    return {"notes": list(notes.values()), "cases": cases}
