"""The process of one variant of `distegnn bench step`: times it and prints JSON.

Started as ``python -m dist_egnn.bench_worker FOLDER NAME OPTIONS``: FOLDER holds graph.npz, OPTIONS are JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dgl
import numpy as np
import torch
from dgl import DGLGraph

from . import graphs, models
from .bench_step import PEERS, Options, load_peer
from .errors import Failure
from .local import watch
from .metrics import peak_memory_gb


def _graph(folder: Path) -> DGLGraph:
    with np.load(folder / "graph.npz") as file:
        fields = {name: file[name] for name in file.files}
    return graphs.build(fields.pop("src"), fields.pop("dst"), fields)


def _variant(name: str, options: Options, graph: DGLGraph) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """A variant's model and its prediction of the graph's next positions. All have the weights of ours where they can."""
    chosen: dict[str, Any] = {k: getattr(options, k) for k in ("hidden", "layers", "virtual_nodes", "engine")}
    if options.tile is not None:
        chosen["tile"] = options.tile
    if options.precision != "float32":
        chosen["precision"] = options.precision
    torch.manual_seed(0)
    features, attributes, edge = graph.ndata["f"].shape[1], graph.ndata["a"].shape[1], graph.edata["e"].shape[1]
    ours = models.EGNN(features, attributes, edge, **chosen)
    if name in PEERS:
        return load_peer(name).peer(ours, graph, torch.device(options.device))
    ours.to(options.device)
    with contextlib.suppress(dgl.DGLError):  # no build for the device: the model takes the fields there itself
        graph = graph.to(options.device)
    return ours, lambda: ours(graph)[0]


def _times(work: Callable[[], Any], repeats: int, device: str) -> list[float]:
    """Seconds of each repetition, after a warm-up."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _peak_gb(device: str) -> float:
    """The largest resident memory of this process, or memory of its device, in GB."""
    return peak_memory_gb() if device == "cpu" else torch.cuda.max_memory_allocated(device) / 1e9


def machine_rates(device: str) -> dict[str, float]:
    """GFLOP/s of 64-wide float32 products here and now, by torch's own linear and, where there is one, by oneDNN's."""
    x, w, b = (torch.randn(shape, device=device) for shape in ((8192, 64), (64, 64), (64,)))
    ways: dict[str, Callable[[], Any]] = {"machine_gflops": lambda: torch.nn.functional.linear(x, w, b)}
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if device == "cpu" else None
    if onednn is not None:
        ways["machine_gflops_onednn"] = lambda: onednn(x, w, b, "none", [], "")
    work = 2 * 8192 * 64 * 64 / 1e9
    with torch.no_grad():
        return {name: work / statistics.median(_times(way, 100, device)) for name, way in ways.items()}


def worker(folder: Path, name: str, options: Options) -> dict[str, Any]:
    """Time a variant: training steps first, so that the peak is theirs, then forward passes alone."""
    torch.set_num_threads(options.threads)
    graph = _graph(folder)
    model, predict = _variant(name, options, graph)
    target = graph.ndata["y"].to(options.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(predict(), target).backward()

    steps = _times(step, options.repeats, options.device)
    peak = _peak_gb(options.device)
    with torch.no_grad():
        forwards = _times(predict, options.repeats, options.device)
        np.save(folder / f"{name}.npy", predict().cpu().numpy())
    return {
        "forward_s": statistics.median(forwards),
        "step_s": statistics.median(steps),
        "peak_gb": peak,
        "forward_all_s": forwards,
        "step_all_s": steps,
        **({} if name in PEERS else {"tile": model.tile}),
        **machine_rates(options.device),
    }


def main() -> None:
    """A worker: JSON on the last line of standard output, or one line on standard error and exit code 2."""
    folder, name, options = sys.argv[1:]
    watch(os.getppid(), Path(folder))  # nobody is left to read what an orphan measures
    try:
        found = worker(Path(folder), name, Options(**json.loads(options)))
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
