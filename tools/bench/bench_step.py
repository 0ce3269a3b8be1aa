"""Forward and training step of one snapshot: ours and its peers, each in a fresh process, on the same graph and weights."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_egnn.errors import Failure
from dist_egnn.utils import filesystem, memory, progress

PEERS = {"EGNNConv": "egnnconv", "plain": "plain"}  # modules beside this one
ONE_TILE = 10**9
FILES = os.environ.get("TMPDIR") or "/var/tmp"
ENGINES, PRECISIONS = ("auto", "dgl", "torch"), ("float32", "bf16-messages")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is run: the graph, the model and its widths, and how.

    tile: None for the model's own; full_size: equivariance is measured with last weights of full size, in float64 too.
    kept: as train.kept; None: in memory if there is enough, else in FILES.
    """

    nodes: int = 113_140
    degree: float = 14.6
    hidden: int = 64
    layers: int = 4
    virtual_nodes: int = 3
    threads: int = 1
    engine: str = "auto"
    device: str = "cpu"
    precision: str = "float32"
    tile: int | None = None
    repeats: int = 3
    model: str = "FastEGNN"
    full_size: bool = False
    kept: str | None = None


def variants(options: Options, peers: bool) -> dict[str, Options]:
    """What is timed, by name, 'ours' first."""
    found = {"ours": options}
    if not peers:
        return found
    if options.precision != "float32":
        found["float32"] = replace(options, precision="float32")
    if options.threads > 1:
        found["1-thread"] = replace(options, threads=1)
    found["untiled"] = replace(options, tile=ONE_TILE)
    return {**found, **{name: replace(options, precision="float32") for name in PEERS}}


def memory_needed(name: str, options: Options) -> float:
    """About how many bytes the process of a variant takes in a training step, torch and DGL included."""
    edges = options.nodes * options.degree
    if name in PEERS or (options.tile or 0) >= edges:
        block = edges
    else:
        from dist_egnn.ops import tiling

        block = (options.tile or tiling.BLOCK_EDGES) * (1 if options.device == "cpu" else tiling.ACCELERATOR_FACTOR)
    layers = 0 if options.kept else options.layers  # whose inputs and means lie in memory
    return memory.step_bytes(options.nodes, edges, options.hidden, layers, block)


def kept_bytes(options: Options) -> int:
    """What a step keeps of its layers: inputs and means."""
    return 2 * options.layers * options.nodes * 4 * (options.hidden + 3)


def placed(options: Options) -> tuple[Options, str]:
    """The options with a place for what a step keeps, and a line about it where that is not memory."""
    if options.kept is not None or options.device != "cpu":
        return replace(options, kept=options.kept or ""), ""
    there = memory.available_memory(options.device)
    in_memory, in_files = (memory_needed("ours", replace(options, kept=kept)) for kept in ("", FILES))
    if in_memory <= there or in_files > there:
        return replace(options, kept=""), ""
    return replace(options, kept=FILES), (
        f"a step would take about {in_memory / 1e9:.1f} GB, {there / 1e9:.1f} GB are free: it keeps its layers' inputs in files "
        f"in {FILES}, {kept_bytes(options) / 1e9:.1f} GB, and takes about {in_files / 1e9:.1f} GB"
    )


def check_degree(nodes: int, degree: float) -> None:
    """Raise Failure for a mean degree that no graph of so many nodes has."""
    if not 0 < degree <= nodes - 1:
        raise Failure(f"--degree {degree}: must be above 0 and at most {nodes - 1} for {nodes} nodes")


def check(options: Options, peers: bool) -> None:
    """Raise Failure for what cannot run, before anything does."""
    least = {"nodes": 2, "hidden": 1, "layers": 1, "virtual_nodes": 0, "threads": 1, "tile": 1, "repeats": 1}
    for key, low in least.items():
        value = getattr(options, key)
        if value is not None and value < low:
            raise Failure(f"--{key.replace('_', '-')} {value}: must be at least {low}")
    check_degree(options.nodes, options.degree)
    for key, known in (("engine", ENGINES), ("precision", PRECISIONS)):
        if getattr(options, key) not in known:
            raise Failure(f"--{key} {getattr(options, key)}: unknown; use {', '.join(known[:-1])} or {known[-1]}")
    check_device(options)
    for name, one in variants(options, peers).items():
        what = f"{options.nodes:,} nodes of degree {options.degree:g}: '{name}'"
        remedy = "lower --nodes, --hidden or --layers" + ", or leave --peers out" * peers
        memory.require_memory(memory_needed(name, one), options.device, what, remedy)
    if options.kept:
        from dist_egnn.ops import activation_offload

        activation_offload.check_folder(options.kept, "--kept ")
        filesystem.check_free_space(Path(options.kept) / "kept", kept_bytes(options))


def check_device(options: Options) -> None:
    """Raise Failure for a device that is not there or that the engine has no kernels for."""
    if options.device == "cpu":
        return
    from dist_egnn.utils import devices

    devices.check_name(options.device, "--device ")
    devices.check_available(options.device, "--device ")
    if options.engine == "dgl" and not dgl_runs_on(options.device):
        raise Failure(f"--engine dgl: this DGL has no build for {options.device}; use --engine torch")


def dgl_runs_on(device: str) -> bool:
    """Whether DGL has kernels for the device."""
    from dist_egnn.ops import message_passing

    return message_passing.dgl_supports(device)


def load_peer(name: str) -> Any:
    """The module of a peer, which stands beside this file."""
    return importlib.import_module(PEERS[name])


def products(options: Options, edges: int) -> float:
    """Operations in the matrix products of a forward pass, first-layer products on nodes; 2 for a multiply and an add."""
    h, c = options.hidden, options.virtual_nodes
    on_edge = 3 * h + 2 * h * h + h  # squared length and e; φ_e's and φ_x's inner layers; φ_x's last
    on_node = 2 * h * h + (h * h + h) + (2 + bool(c)) * h * h + 2 * h + h * h  # φ_e's first; φ_v; φ_h with a
    on_virtual = h * h * bool(c) + c * (
        h + 3 * h * h + 2 * h
    )  # φ_ev's first on h, on the distance; the rest for each c
    return 2.0 * options.layers * (edges * on_edge + options.nodes * (on_node + on_virtual)) + 6 * options.nodes * h


def run(options: Options, peers: bool, say: Say = lambda line: None) -> dict[str, Any]:
    """Time ours and, if asked, the peers; say(line) as each ends.

    Returns the options, ``place``, a line where memory was too small for what a step keeps, ours' numbers (those of
    bench_worker.worker and gflops_forward, products done a second), and peers: name → the same, with …_ratio to ours and
    ``difference``, the largest from our prediction, in units of the farthest that the model moves a node.
    """
    options, place = placed(options)
    check(options, peers)
    import bench_data

    if place:
        say(place)
    wanted = variants(options, peers)
    if options.device != "cpu" and peers and not dgl_runs_on(options.device):
        del wanted["EGNNConv"]
        say(f"EGNNConv left out: this DGL has no build for {options.device}")
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as name:
        folder = Path(name)
        say(f"making a graph of {options.nodes:,} nodes")
        x = bench_data.block(options.nodes)
        edges = write_graphs([(x, bench_data.radius_for(x, options.degree))], folder)
        del x
        say(f"{options.nodes:,} nodes, {edges:,} edges")
        found = {}
        for variant, one in wanted.items():
            found[variant] = row = spawn({variant: one}, folder)[variant]
            say(f"{variant}: forward {row['forward_s']:.3f} s, step {row['step_s']:.3f} s, {row['peak_gb']:.2f} GB")
        apart = differences(folder, [v for v in wanted if v not in ("ours", "EGNNConv")])
    ours = found.pop("ours")
    for variant, row in found.items():
        ratios = {key.rsplit("_", 1)[0]: row[key] / ours[key] for key in ("forward_s", "step_s", "peak_gb")}
        row.update({f"{key}_ratio": value for key, value in ratios.items()})
        row.update({"difference": apart[variant]} if variant in apart else {})
        row.pop("machine_gflops"), row.pop("machine_gflops_onednn", None)
    gflops = products(options, edges) / 1e9
    rate = gflops / ours["forward_s"]
    return {**asdict(options), **ours, "place": place, "edges": edges, "gflops_forward": rate, "peers": found}


def write_graphs(made: Iterable[tuple[np.ndarray, float]], folder: Path) -> int:
    """Radius graphs as one batch, from the positions (N, 3) and radius of each; made here, so that no worker's peak memory
    counts the making. Returns their edges."""
    import bench_data
    from dist_egnn.partition import neighbors

    parts: list[dict[str, Any]] = []
    first = 0
    for seed, (x, radius) in enumerate(made):
        ends, src = neighbors.in_neighbors(x, radius, np.arange(len(x)))
        src += first
        counts = {"graph_nodes": [len(x)], "graph_edges": [len(src)], "degree": np.diff(ends).astype(np.int32)}
        parts.append({"src": src, **counts, **bench_data.node_fields(x, seed)})
        first += len(x)
    edges = sum(len(part["src"]) for part in parts)
    with zipfile.ZipFile(folder / "graph.npz", "w") as file:  # one field after the other: numpy.savez takes all at once
        for name in list(parts[0]):
            with file.open(f"{name}.npy", "w", force_zip64=True) as into:
                np.lib.format.write_array(into, np.concatenate([part.pop(name) for part in parts]))
    return edges


def spawn(wanted: dict[str, Options], folder: Path) -> dict[str, dict[str, Any]]:
    """Run variants, taking turns, in one fresh process and return what it measured of each."""
    name = ", ".join(wanted)
    threads = str(max(options.threads for options in wanted.values()))
    given = json.dumps({variant: asdict(options) for variant, options in wanted.items()})
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bench_worker.py")), str(folder), given],
            # numbers of threads are read when torch is imported
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, progress.EVENTS_VARIABLE: "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        try:
            last = _shown(process.stdout)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        said = errors.read().strip() or "it said nothing"
    if code < 0:
        raise Failure(f"'{name}' was ended by signal {-code}; short of memory?")
    if code:
        raise Failure(f"'{name}': {said.splitlines()[-1].removeprefix('error: ')}")
    return json.loads(last)


def _shown(lines: Iterable[str]) -> str:
    """Show the progress that a worker tells; returns the last line of its own."""
    last = title = ""
    with contextlib.ExitStack() as bars:
        for line in lines:
            if not line.startswith(progress.EVENT_PREFIX):
                last = line if line.strip() else last
                continue
            told = json.loads(line.removeprefix(progress.EVENT_PREFIX))
            if told["title"] != title:
                title = told["title"]
                bars.close()
                tick = bars.enter_context(progress.progress_bar(title, told["total"]))
            tick(told["note"], completed=told["done"])
    return last


def differences(folder: Path, names: list[str]) -> dict[str, float]:
    """How far predictions lie from ours: the largest difference, relative to how far ours moves a node at most."""
    with np.load(folder / "graph.npz") as graph:
        x = graph["x"]
    ours = np.load(folder / "ours.npy")
    moved = float(np.abs(ours - x).max())
    return {name: float(np.abs(np.load(folder / f"{name}.npy") - ours).max()) / moved for name in names}
