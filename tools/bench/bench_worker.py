"""A process of `distegnn bench step`, `batch` or `models`: times a variant, or several that take turns, and prints JSON.

Started as ``tools/bench/bench_worker.py FOLDER WANTED``: FOLDER holds graph.npz, WANTED is JSON, name → options.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dgl
import numpy as np
import torch
from bench_step import PEERS, Options, load_peer
from dgl import DGLGraph

from dist_egnn.config import Model
from dist_egnn.data import graphs
from dist_egnn.distributed.spawn import exit_with_parent
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check
from dist_egnn.models import network
from dist_egnn.ops import activation_offload
from dist_egnn.train.metrics import peak_memory_gb
from dist_egnn.utils import devices
from dist_egnn.utils.progress import progress_bar

LONG = 60.0  # seconds of a pass from which one counts by itself, without warm-up or repeats


def _graph(folder: Path) -> DGLGraph:
    with np.load(folder / "graph.npz") as file:
        fields = {name: file[name] for name in file.files}
    nodes, edges = (torch.from_numpy(fields.pop(name)) for name in ("graph_nodes", "graph_edges"))
    degree = fields.pop("degree")
    graph = graphs.build_graph(fields.pop("src"), np.repeat(np.arange(len(degree), dtype=np.int32), degree), fields)
    graph.set_batch_num_nodes(nodes)
    graph.set_batch_num_edges(edges)
    return graph


@dataclass
class _Variant:
    """A model and its prediction of the graph's next positions."""

    model: torch.nn.Module
    graph: DGLGraph
    predict: Callable[[], torch.Tensor]
    tiles_s: float  # what cutting the graph's tiles took


def _variant(name: str, options: Options, graph: DGLGraph) -> _Variant:
    """A variant, ready to be run. All have the weights of ours where they can."""
    keys = ("hidden", "layers", "virtual_nodes", "engine", "precision", *(() if options.tile is None else ("tile",)))
    settings = {**asdict(Model()), "name": options.model, **{key: getattr(options, key) for key in keys}}
    kind, chosen = network.resolve_model(settings, asdict(Model()), float(graph.edata["e"].max()))
    torch.manual_seed(0)
    features, attributes, edge = graph.ndata["f"].shape[1], graph.ndata["a"].shape[1], graph.edata["e"].shape[1]
    ours = kind(features=features, node_attributes=attributes, edge_attributes=edge, **chosen)
    if name in PEERS:
        model, predict = load_peer(name).peer(ours, graph, torch.device(options.device))
        return _Variant(model, graph, predict, 0.0)
    ours.to(options.device)
    with contextlib.suppress(dgl.DGLError):  # no build for the device: the model takes the fields there itself
        graph = graph.to(options.device)
    started = time.perf_counter()
    getattr(ours, "prepare", lambda graph: graph)(graph)
    return _Variant(ours, graph, lambda: ours(graph)[0], time.perf_counter() - started)


def _times(
    works: dict[str, Callable[[], Any]], repeats: int, device: str, told: Callable[[], Any] = contextlib.nullcontext
) -> dict[str, list[float]]:
    """Seconds of each repetition of each work, after a warm-up. They take turns, and to go first: a fair share of noise.

    A warm-up that takes LONG is all that is done, and counts. told: the context of the warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            with contextlib.nullcontext() if turn else told():
                started = time.perf_counter()
                works[name]()
                devices.synchronize(torch.device(device))
                seconds[name].append(time.perf_counter() - started)
        if turn == 0 and max(each[0] for each in seconds.values()) >= LONG:
            return seconds
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


def _step(one: _Variant, folder: str) -> None:
    """Forward and backward of the MSE; folder: as train.kept."""
    one.model.zero_grad(set_to_none=True)
    with activation_offload.offload_to_disk(folder, [one.graph.edata[name] for name in one.graph.edata]):
        predicted = one.predict()
    torch.nn.functional.mse_loss(predicted, one.graph.ndata["y"].to(predicted.device)).backward()


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


@contextlib.contextmanager
def _told(title: str, one: _Variant) -> Iterator[None]:
    """Tell how far the pass within is, forward or a whole step, and how long it will take: a layer updates every tile once forward
    and once more backward, in three times the time."""
    if not isinstance(one.model, network.Network):
        yield
        return
    forward = len(one.model.layers) * len(one.model.engine_and_tiles(one.graph)[1].tiles)
    done = 0
    with progress_bar(title, forward * (4 if torch.is_grad_enabled() else 1)) as tick:

        def counted(update: Callable[[Any], Any], nodes: Any) -> Any:
            nonlocal done
            done += 1 if done < forward else 3
            tick(completed=done)
            return update(nodes)

        layers: list[Any] = list(one.model.layers)
        for layer in layers:
            layer.update = partial(counted, layer.update)
        try:
            yield
        finally:
            for layer in layers:
                del layer.update


def worker(folder: Path, wanted: dict[str, Options]) -> dict[str, dict[str, Any]]:
    """Time variants: forward passes without gradients first, so that their peak is theirs, then training steps.

    All have the repeats, threads and device of the first; each has a graph of its own, since a graph keeps one set of tiles.
    Returns of each forward_s and step_s (medians, every repetition in …_all_s), forward_peak_gb and peak_gb of a step, ``once``,
    which of "forward" and "step" took so long that one counted, machine_gflops…, and of ours tile, tiles_s (cutting them, before
    the passes), parameters and, unless a forward pass takes long, equivariance_error, in units of the farthest that the model moves
    a node.
    """
    first = next(iter(wanted.values()))
    torch.set_num_threads(first.threads)
    device = torch.device(first.device)
    found = {name: _variant(name, options, _graph(folder)) for name, options in wanted.items()}
    name, one = next(iter(found.items()))

    def timed(works: dict[str, Callable[[], Any]], kind: str) -> dict[str, list[float]]:
        told = partial(_told, f"{name}, {kind}", one) if len(wanted) == 1 else contextlib.nullcontext
        return _times(works, first.repeats, first.device, told)

    def predict(name: str, one: _Variant) -> None:
        predicted = one.predict().cpu().numpy()
        if not (folder / f"{name}.npy").exists():
            np.save(folder / f"{name}.npy", predicted)

    with torch.no_grad():
        forward_s = timed({name: partial(predict, name, one) for name, one in found.items()}, "forward")
    forward_peak = peak_memory_gb(device)
    step_s = timed({name: partial(_step, one, wanted[name].kept or "") for name, one in found.items()}, "step")
    shared: dict[str, Any] = {"forward_peak_gb": forward_peak, "peak_gb": peak_memory_gb(device)}
    every = {"forward": forward_s, "step": step_s}
    once = [kind for kind, of in every.items() if any(len(each) == 1 and each[0] >= LONG for each in of.values())]
    shared |= {"once": once, **machine_rates(first.device)}
    return {
        name: {
            **{f"{kind}_s": statistics.median(of[name]) for kind, of in every.items()},
            **{f"{kind}_all_s": of[name] for kind, of in every.items()},
            **shared,
            **(_about(one, wanted[name], "forward" not in once) if name not in PEERS else {}),
        }
        for name, one in found.items()
    }


def _about(one: _Variant, options: Options, exact: bool) -> dict[str, Any]:
    """What is said of ours alone; exact: its equivariance too."""
    parameters = sum(p.numel() for p in one.model.parameters())
    found = {"tile": getattr(one.model, "tile", None), "tiles_s": one.tiles_s, "parameters": parameters}
    if not exact:
        return found
    with torch.no_grad():
        if options.full_size:
            parallel_check.randomize_output_weights(one.model)
        found["equivariance_error"] = _equivariance_error(one.model, one.graph)
        if options.full_size:
            found["equivariance_error_float64"] = _equivariance_error(one.model.double(), one.graph)
    return found


def main() -> None:
    """A worker: JSON on the last line of standard output, or one line on standard error and exit code 2."""
    folder, wanted = sys.argv[1:]
    exit_with_parent(os.getppid(), Path(folder))  # nobody is left to read what an orphan measures
    try:
        found = worker(Path(folder), {name: Options(**given) for name, given in json.loads(wanted).items()})
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
