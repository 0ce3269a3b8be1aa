"""Every model on two kinds of graphs: parameters, time, memory and equivariance error."""

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
from bench_step import Log, Options

from dist_egnn.errors import Failure

BODIES = 100  # nodes of an N-body graph, as in the recipe


def _cases(options: Options, graphs: int) -> Iterator[tuple[str, Options, list[tuple[np.ndarray, float]]]]:
    """Name of a case, options with its size, positions (N, 3) and radius of each graph."""
    bodies = [(bench_data.block(BODIES, seed), math.inf) for seed in range(graphs)]
    yield f"{graphs} N-body graphs", replace(options, nodes=BODIES * graphs, degree=BODIES - 1), bodies
    x = bench_data.block(options.nodes)
    yield "fluid", options, [(x, bench_data.radius_for(x, options.degree))]


def measure_models(
    options: Options, graphs: int, names: Sequence[str] | None, log: Log = lambda line: None
) -> dict[str, Any]:
    """Measure the models of these names, or all, each in its own process; log(line) after each.

    Returns ``notes`` (models that were skipped and why, for instance a missing library) and ``cases``: ``case``, ``nodes``,
    ``edges`` and ``models``, name → parameters, forward_s, step_s, peak_gb, equivariance_error, equivariance_error_float64
    and the other values of bench_worker. Raises Failure for an unknown name, or if no model could be measured.
    """
    from dist_egnn.models import network

    for name in names or ():
        network.model_class(name)
    bench_step.check_options(options, peers=False)
    notes: dict[str, str] = {}
    cases = []
    for case, sized, inputs in _cases(replace(options, full_size=True), graphs):
        bench_step.check_options(sized, peers=False)
        with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
            edges = bench_step.write_graphs(inputs, Path(folder))
            models = {}
            for name in names or network.MODELS:
                try:
                    models[name] = row = bench_step.measure_in_process(
                        {name: replace(sized, model=name)}, Path(folder)
                    )[name]
                except Failure as failure:
                    notes[name] = f"{name} left out: {failure}"
                    log(notes[name])
                else:
                    log(f"{case}, {name}: forward {row['forward_s']:.3f} s, step {row['step_s']:.3f} s")
        cases.append({"case": case, "nodes": sized.nodes, "edges": edges, "models": models})
    if not any(case["models"] for case in cases):
        raise Failure("; ".join(notes.values()))
    return {"notes": list(notes.values()), "cases": cases}
