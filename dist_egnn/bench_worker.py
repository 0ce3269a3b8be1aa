"""A process of `distegnn bench step`, `batch` or `models`: times a variant, or several that take turns, and prints JSON.

Started as ``python -m dist_egnn.bench_worker FOLDER WANTED``: FOLDER holds graph.npz, WANTED is JSON, name → options.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dgl
import numpy as np
import torch
from dgl import DGLGraph

from . import devices, exactness, graphs, kept, models
from .bench_step import PEERS, Options, load_peer
from .config import Model
from .errors import Failure
from .local import watch
from .metrics import peak_memory_gb


def _graph(folder: Path) -> DGLGraph:
    with np.load(folder / "graph.npz") as file:
        fields = {name: file[name] for name in file.files}
    nodes, edges = (torch.from_numpy(fields.pop(name)) for name in ("graph_nodes", "graph_edges"))
    graph = graphs.build(fields.pop("src"), fields.pop("dst"), fields)
    graph.set_batch_num_nodes(nodes)
    graph.set_batch_num_edges(edges)
    return graph


def _variant(name: str, options: Options, graph: DGLGraph) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """A variant's model and its prediction of the graph's next positions. All have the weights of ours where they can."""
    keys = ("hidden", "layers", "virtual_nodes", "engine", "precision", *(() if options.tile is None else ("tile",)))
    settings = {**asdict(Model()), "name": options.model, **{key: getattr(options, key) for key in keys}}
    kind, chosen = models.choose(settings, asdict(Model()), float(graph.edata["e"].max()))
    torch.manual_seed(0)
    features, attributes, edge = graph.ndata["f"].shape[1], graph.ndata["a"].shape[1], graph.edata["e"].shape[1]
    ours = kind(features=features, node_attributes=attributes, edge_attributes=edge, **chosen)
    if name in PEERS:
        return load_peer(name).peer(ours, graph, torch.device(options.device))
    ours.to(options.device)
    with contextlib.suppress(dgl.DGLError):  # no build for the device: the model takes the fields there itself
        graph = graph.to(options.device)
    return ours, lambda: ours(graph)[0]


def _times(works: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each repetition of each work, after a warm-up. They take turns, and to go first: a fair share of noise."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            started = time.perf_counter()
            works[name]()
            devices.wait(torch.device(device))
            seconds[name].append(time.perf_counter() - started)
    return {name: each[1:] for name, each in seconds.items()}


def machine_rates(device: str) -> dict[str, float]:
    """GFLOP/s of 64-wide float32 products here and now, by torch's own linear and, where there is one, by oneDNN's."""
    x, w, b = (torch.randn(shape, device=device) for shape in ((8192, 64), (64, 64), (64,)))
    ways: dict[str, Callable[[], Any]] = {"machine_gflops": lambda: torch.nn.functional.linear(x, w, b)}
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if device == "cpu" else None
    if onednn is not None:
        ways["machine_gflops_onednn"] = lambda: onednn(x, w, b, "none", [], "")
    work = 2 * 8192 * 64 * 64 / 1e9
    with torch.no_grad():
        return {name: work / statistics.median(_times({"": way}, 100, device)[""]) for name, way in ways.items()}


def _step(
    model: torch.nn.Module, predict: Callable[[], torch.Tensor], target: torch.Tensor, folder: str
) -> Callable[[], None]:
    """Forward and backward of the MSE; folder: as train.kept."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with kept.on_disk(folder):
            predicted = predict()
        torch.nn.functional.mse_loss(predicted, target).backward()

    return step


def _equivariance_error(model: torch.nn.Module, graph: DGLGraph) -> float:
    """max |f(Qx) − Q f(x)| for a random orthogonal Q, in units of the farthest that the model moves a node, if it does."""
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    dtype = next(model.parameters()).dtype
    here, turned = graph.local_var(), graph.local_var()
    for name in ("x", "v", "centroid"):
        here.ndata[name] = graph.ndata[name].to(dtype)
        turned.ndata[name] = (graph.ndata[name].double() @ q.t()).to(dtype)
    x, there = (model(seen)[0].detach().double().cpu() for seen in (here, turned))
    return float((there - x @ q.t()).abs().max()) / (float((x - graph.ndata["x"]).abs().max()) or 1.0)


def worker(folder: Path, wanted: dict[str, Options]) -> dict[str, dict[str, Any]]:
    """Time variants: training steps first, so that the peak is theirs, then forward passes alone.

    All have the repeats, threads and device of the first; each has a graph of its own, since a graph keeps one set of tiles.
    """
    first = next(iter(wanted.values()))
    torch.set_num_threads(first.threads)
    steps, predicts = {}, {}
    more: dict[str, dict[str, Any]] = {}
    models_of: dict[str, tuple[torch.nn.Module, DGLGraph]] = {}
    for name, options in wanted.items():
        graph = _graph(folder)
        model, predicts[name] = _variant(name, options, graph)
        steps[name] = _step(model, predicts[name], graph.ndata["y"].to(options.device), options.kept)
        if name not in PEERS:
            parameters = sum(p.numel() for p in model.parameters())
            more[name] = {"tile": getattr(model, "tile", None), "parameters": parameters}
            models_of[name] = model, graph
    step_s = _times(steps, first.repeats, first.device)
    peak = peak_memory_gb(torch.device(first.device))
    with torch.no_grad():
        forward_s = _times(predicts, first.repeats, first.device)
        for name, predict in predicts.items():
            np.save(folder / f"{name}.npy", predict().cpu().numpy())
        for name, (model, graph) in models_of.items():
            if wanted[name].full_size:
                exactness.full_size(model)
            more[name]["equivariance_error"] = _equivariance_error(model, graph)
            if wanted[name].full_size:
                more[name]["equivariance_error_float64"] = _equivariance_error(model.double(), graph)
    rates = machine_rates(first.device)
    return {
        name: {
            "forward_s": statistics.median(forward_s[name]),
            "step_s": statistics.median(step_s[name]),
            "peak_gb": peak,
            "forward_all_s": forward_s[name],
            "step_all_s": step_s[name],
            **more.get(name, {}),
            **rates,
        }
        for name in wanted
    }


def main() -> None:
    """A worker: JSON on the last line of standard output, or one line on standard error and exit code 2."""
    folder, wanted = sys.argv[1:]
    watch(os.getppid(), Path(folder))  # nobody is left to read what an orphan measures
    try:
        found = worker(Path(folder), {name: Options(**given) for name, given in json.loads(wanted).items()})
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
