"""The time and the quality of every partition method, and the time to write a store."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_data
from dist_egnn.partition import assign

from dist_egnn.data import graphs


def measure_methods(nodes: int, degree: float, parts: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Time `assign` of every method on one block, then writing a store of that snapshot with METIS."""
    x = bench_data.block(nodes)
    radius = bench_data.radius_for(x, degree)
    src, dst = graphs.radius_edges(x, radius)
    warm_up = bench_data.block(20 * parts)
    warm_up_edges = graphs.radius_edges(warm_up, 1.5 * bench_data.SPACING)
    methods = {}
    for name in assign.METHODS:
        assign.assign(name, warm_up, *warm_up_edges, parts)  # imports the libraries of the method
        started = time.perf_counter()
        part = assign.assign(name, x, src, dst, parts)
        seconds = time.perf_counter() - started
        quality = assign.quality(part, src, dst, parts)
        costs = {"edge_cut": quality.edge_cut, "balance": quality.balance, "halo": quality.halo_share}
        methods[name] = {"seconds": seconds, **costs}
        log(f"{nodes:,} nodes, {name}: {seconds:.2f} s")
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        path = Path(folder) / "block.h5"
        bench_data.write_trajectories(path, x, 1)
        started = time.perf_counter()
        bench_data.write_store(path, Path(folder) / "store", radius, parts)
        seconds = time.perf_counter() - started
    return {"nodes": nodes, "edges": len(src), "parts": parts, "store_s": seconds, "methods": methods}
