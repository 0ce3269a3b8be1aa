"""The process that times variants for `python tools/bench step`, `batch` and `models`, and prints JSON.

Arguments: FOLDER, which holds graph.npz, and JSON, name → options of each variant.
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

import dist_egnn  # noqa: F401  # isort: skip  (before DGL, see dist_egnn/data/dgl_compat.py)

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
from dist_egnn.models import network, resolve
from dist_egnn.ops import activation_offload, tiled_layer
from dist_egnn.ops.native import library
from dist_egnn.ops.native.kernels import Linear
from dist_egnn.train.metrics import peak_memory_gb
from dist_egnn.utils import devices
from dist_egnn.utils.progress import progress_bar

LONG_S = 60.0  # a pass that takes longer is measured once, without warm-up or repeats


def _graph(folder: Path) -> DGLGraph:
    with np.load(folder / "graph.npz") as file:
        fields = {name: file[name] for name in file.files}
    nodes, edges = (torch.from_numpy(fields.pop(name)) for name in ("graph_nodes", "graph_edges"))
    degree = fields.pop("degree")
    graph = graphs.build_graph(fields.pop("src"), np.repeat(np.arange(len(degree), dtype=np.int32), degree), fields)
    graph.set_batch_num_nodes(nodes.to(graph.idtype))
    graph.set_batch_num_edges(edges.to(graph.idtype))
    return graph


@dataclass
class _Variant:
    """A model and its prediction of the graph's next positions."""

    model: torch.nn.Module
    graph: DGLGraph
    predict: Callable[[], torch.Tensor]
    tiles_s: float  # time to make the graph's tiles


def _variant(name: str, options: Options, graph: DGLGraph) -> _Variant:
    """A variant, ready to run. Peers take the weights of our model if they can."""
    keys = ("hidden", "layers", "virtual_nodes", "engine", "precision", *(() if options.tile is None else ("tile",)))
    settings = {**asdict(Model()), "name": options.model, **{key: getattr(options, key) for key in keys}}
    cls, arguments = resolve.resolve_model(settings, asdict(Model()), float(graph.edata["e"].max()))
    torch.manual_seed(0)
    features, attributes, edge = graph.ndata["f"].shape[1], graph.ndata["a"].shape[1], graph.edata["e"].shape[1]
    ours = cls(features=features, node_attributes=attributes, edge_attributes=edge, **arguments)
    if name in PEERS:
        model, predict = load_peer(name).peer(ours, graph, torch.device(options.device))
        return _Variant(model, graph, predict, 0.0)
    ours.to(options.device)
    with contextlib.suppress(dgl.DGLError):  # DGL has no build for the device: the model moves the fields itself
        graph = graph.to(options.device)
    started = time.perf_counter()
    getattr(ours, "prepare", lambda graph: graph)(graph)
    return _Variant(ours, graph, lambda: ours(graph)[0], time.perf_counter() - started)


def _times(
    works: dict[str, Callable[[], Any]],
    repeats: int,
    device: str,
    warm_up: Callable[[], Any] = contextlib.nullcontext,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of each repetition of each work after a warm-up. They alternate, also in who comes first.

    A warm-up that takes LONG_S is the only repetition, and counts. warm_up: the context of the warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    now = time.process_time if clock == "processor" else time.perf_counter
    for turn in range(repeats + 1):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            with contextlib.nullcontext() if turn else warm_up():
                started = now()
                works[name]()
                devices.synchronize(torch.device(device))
                seconds[name].append(now() - started)
        if turn == 0 and max(each[0] for each in seconds.values()) >= LONG_S:
            return seconds
    return {name: each[1:] for name, each in seconds.items()}


def machine_rates(device: str) -> dict[str, float]:
    """GFLOP/s of 64-wide float32 matrix products by torch's linear and, where available, by oneDNN's and the native one."""
    x, w, b = (torch.randn(shape, device=device) for shape in ((8192, 64), (64, 64), (64,)))
    kernels: dict[str, Callable[[], Any]] = {"machine_gflops": lambda: torch.nn.functional.linear(x, w, b)}
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if device == "cpu" else None
    if onednn is not None:
        kernels["machine_gflops_onednn"] = lambda: onednn(x, w, b, "none", [], "")
    if device == "cpu" and (native := library.library()):
        kernels["machine_gflops_native"] = lambda: Linear.apply(native, b, x, w)
    work = 2 * 8192 * 64 * 64 / 1e9
    with torch.no_grad():
        return {
            name: work / statistics.median(_times({"": kernel}, 100, device)[""]) for name, kernel in kernels.items()
        }


def _step(variant: _Variant, folder: str) -> None:
    """Forward and backward of the MSE; folder: as train.kept."""
    variant.model.zero_grad(set_to_none=True)
    with activation_offload.offload_to_disk(folder, [variant.graph.edata[name] for name in variant.graph.edata]):
        predicted = variant.predict()
    torch.nn.functional.mse_loss(predicted, variant.graph.ndata["y"].to(predicted.device)).backward()


def _equivariance_error(model: torch.nn.Module, graph: DGLGraph) -> float:
    """max |f(Qx) − Q f(x)| for a random orthogonal Q, relative to the largest displacement of a node if not zero."""
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    dtype = next(model.parameters()).dtype
    plain, rotated = graph.local_var(), graph.local_var()
    for name in ("x", "v", "centroid"):
        plain.ndata[name] = graph.ndata[name].to(dtype)
        rotated.ndata[name] = (graph.ndata[name].double() @ q.t()).to(dtype)
    x, x_rotated = (model(g)[0].detach().double().cpu() for g in (plain, rotated))
    return float((x_rotated - x @ q.t()).abs().max()) / (float((x - graph.ndata["x"]).abs().max()) or 1.0)


@contextlib.contextmanager
def _progress(title: str, variant: _Variant) -> Iterator[None]:
    """Show the progress of a forward pass or a step: each layer updates every tile once forward and once, in about three
    times the time, backward."""
    if not isinstance(variant.model, network.Network):
        yield
        return
    forward = len(variant.model.layers) * len(variant.model.engine_and_tiles(variant.graph)[1].tiles)
    done = 0
    with progress_bar(title, forward * (4 if torch.is_grad_enabled() else 1)) as tick:

        def counted(update: Callable[[Any], Any], nodes: Any) -> Any:
            nonlocal done
            done += 1 if done < forward else 3
            tick(completed=done)
            return update(nodes)

        layers: list[Any] = list(variant.model.layers)
        for layer in layers:
            layer.update = partial(counted, layer.update)
        try:
            yield
        finally:
            for layer in layers:
                del layer.update


def measure_variants(folder: Path, timed: dict[str, Options]) -> dict[str, dict[str, Any]]:
    """Time forward passes without gradients, so that their peak memory is known, then training steps.

    All variants use the repeats, threads and device of the first. Each has its own graph, since a graph caches one set of
    tiles. Returns for each: forward_s and step_s (medians; every repetition in …_all_s), forward_peak_gb and peak_gb of a
    step, ``once`` (those of "forward" and "step" that were measured once because they are long), machine_gflops…, and for
    our models tile, tiles_s (time to make the tiles), parameters and, unless a forward pass is long, equivariance_error
    (`_equivariance_error`).
    """
    first = next(iter(timed.values()))
    torch.set_num_threads(first.threads)
    if not PEERS.keys() & timed.keys():  # as in training with train.threads
        with tiled_layer.tile_threads(first.threads):
            return _measure(folder, timed, first)
    return _measure(folder, timed, first)


def _measure(folder: Path, timed: dict[str, Options], first: Options) -> dict[str, dict[str, Any]]:
    """`measure_variants` with threads set."""
    device = torch.device(first.device)
    variants = {name: _variant(name, options, _graph(folder)) for name, options in timed.items()}
    name, variant = next(iter(variants.items()))

    def times(works: dict[str, Callable[[], Any]], kind: str) -> dict[str, list[float]]:
        warm_up = partial(_progress, f"{name}, {kind}", variant) if len(timed) == 1 else contextlib.nullcontext
        return _times(works, first.repeats, first.device, warm_up, first.clock)

    def predict(name: str, variant: _Variant) -> None:
        predicted = variant.predict().cpu().numpy()
        if not (folder / f"{name}.npy").exists():
            np.save(folder / f"{name}.npy", predicted)

    with torch.no_grad():
        forward = times({name: partial(predict, name, v) for name, v in variants.items()}, "forward")
    forward_peak = peak_memory_gb(device)
    step = times({name: partial(_step, v, timed[name].kept or "") for name, v in variants.items()}, "step")
    shared: dict[str, Any] = {"forward_peak_gb": forward_peak, "peak_gb": peak_memory_gb(device)}
    seconds = {"forward": forward, "step": step}
    once = [kind for kind, of in seconds.items() if any(len(each) == 1 and each[0] >= LONG_S for each in of.values())]
    shared |= {"once": once, **machine_rates(first.device)}
    return {
        name: {
            **{f"{kind}_s": statistics.median(of[name]) for kind, of in seconds.items()},
            **{f"{kind}_all_s": of[name] for kind, of in seconds.items()},
            **shared,
            **(_model_values(v, timed[name], "forward" not in once) if name not in PEERS else {}),
        }
        for name, v in variants.items()
    }


def _model_values(variant: _Variant, options: Options, equivariance: bool) -> dict[str, Any]:
    """The values of our own models; equivariance: measure its error too."""
    model, graph = variant.model, variant.graph
    parameters = sum(p.numel() for p in model.parameters())
    values = {"tile": getattr(model, "tile", None), "tiles_s": variant.tiles_s, "parameters": parameters}
    if not equivariance:
        return values
    with torch.no_grad():
        if options.full_size:
            parallel_check.randomize_output_weights(model)
        values["equivariance_error"] = _equivariance_error(model, graph)
        if options.full_size:
            values["equivariance_error_float64"] = _equivariance_error(model.double(), graph)
    return values


def main() -> None:
    """Print JSON on the last line of standard output, or one line on standard error with exit code 2."""
    folder, arguments = sys.argv[1:]
    exit_with_parent(os.getppid(), Path(folder))  # nobody reads the result of an orphan
    try:
        timed = {name: Options(**options) for name, options in json.loads(arguments).items()}
        result = measure_variants(Path(folder), timed)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
