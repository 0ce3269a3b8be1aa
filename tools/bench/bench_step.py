"""Forward pass and training step of one snapshot: our model and its peers, each in a new process, on the same graph."""

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
from dist_egnn.utils import filesystem, memory, progress, resources

PEERS = {"EGNNConv": "egnnconv", "plain": "plain"}  # modules in this folder
UNTILED = 10**9  # edges of a tile: more than any graph has
OFFLOAD_FOLDER = os.environ.get("TMPDIR") or "/var/tmp"
ENGINES, PRECISIONS = ("auto", "native", "torch", "dgl"), ("float32", "bf16-messages")
CLOCKS = ("wall", "processor")
Log = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """The graph, the model and how it runs.

    tile: None for the model's default; full_size: measure equivariance with last weights of full size, in float64 too.
    kept: as train.kept; None: in memory if it suffices, otherwise in OFFLOAD_FOLDER. clock: "processor" counts the seconds of
    all threads on a processor, which other programs hardly change.
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
    clock: str = "wall"


def variants(options: Options, peers: bool) -> dict[str, Options]:
    """The options of everything that is timed, by name, 'ours' first."""
    result = {"ours": options}
    if not peers:
        return result
    if options.precision != "float32":
        result["float32"] = replace(options, precision="float32")
    else:
        result["bf16-messages"] = replace(options, precision="bf16-messages")
    if options.threads > 1:
        result["1-thread"] = replace(options, threads=1)
    elif options.device == "cpu" and resources.available_cores() >= 2:
        result["2-threads"] = replace(options, threads=2)
    if options.engine != "torch":
        result["torch"] = replace(options, engine="torch")
    result["untiled"] = replace(options, tile=UNTILED, engine="torch")
    return {**result, **{name: replace(options, precision="float32") for name in PEERS}}


def memory_needed(name: str, options: Options) -> float:
    """Estimated bytes of a process in a training step of a variant, including torch and DGL."""
    edges = options.nodes * options.degree
    if name in PEERS or (options.tile or 0) >= edges:
        block = edges
    else:
        from dist_egnn.ops import tiling

        block = (options.tile or tiling.BLOCK_EDGES) * (1 if options.device == "cpu" else tiling.ACCELERATOR_FACTOR)
    layers = 0 if options.kept else options.layers  # whose inputs and means are in memory
    return memory.step_bytes(options.nodes, edges, options.hidden, layers, block)


def offloaded_bytes(options: Options) -> int:
    """The inputs and means of all layers, which a step keeps for the backward pass."""
    return 2 * options.layers * options.nodes * 4 * (options.hidden + 3)


def choose_offload_folder(options: Options) -> tuple[Options, str]:
    """The options with ``kept`` set, and a note if layers' inputs go to files because memory does not suffice."""
    if options.kept is not None or options.device != "cpu":
        return replace(options, kept=options.kept or ""), ""
    free = memory.available_memory(options.device)
    in_memory, in_files = (memory_needed("ours", replace(options, kept=kept)) for kept in ("", OFFLOAD_FOLDER))
    if in_memory <= free or in_files > free:
        return replace(options, kept=""), ""
    return replace(options, kept=OFFLOAD_FOLDER), (
        f"a step takes about {in_memory / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: its layers' inputs go to files "
        f"in {OFFLOAD_FOLDER}, {offloaded_bytes(options) / 1e9:.1f} GB, and it takes about {in_files / 1e9:.1f} GB"
    )


def check_degree(nodes: int, degree: float) -> None:
    """Raise Failure for a mean degree that a graph with this number of nodes cannot have."""
    if not 0 < degree <= nodes - 1:
        raise Failure(f"--degree {degree}: must be above 0 and at most {nodes - 1} for {nodes} nodes")


def check_options(options: Options, peers: bool) -> None:
    """Raise Failure for options that cannot run."""
    minimum = {"nodes": 2, "hidden": 1, "layers": 1, "virtual_nodes": 0, "threads": 1, "tile": 1, "repeats": 1}
    for key, lowest in minimum.items():
        value = getattr(options, key)
        if value is not None and value < lowest:
            raise Failure(f"--{key.replace('_', '-')} {value}: must be at least {lowest}")
    check_degree(options.nodes, options.degree)
    for key, known in (("engine", ENGINES), ("precision", PRECISIONS), ("clock", CLOCKS)):
        if getattr(options, key) not in known:
            raise Failure(f"--{key} {getattr(options, key)}: unknown; use {', '.join(known[:-1])} or {known[-1]}")
    check_device(options)
    for name, variant in variants(options, peers).items():
        what = f"{options.nodes:,} nodes of degree {options.degree:g}: '{name}'"
        remedy = "lower --nodes, --hidden or --layers" + ", or leave --peers out" * peers
        memory.require_memory(memory_needed(name, variant), options.device, what, remedy)
    if options.kept:
        from dist_egnn.ops import activation_offload

        activation_offload.check_folder(options.kept, "--kept ")
        filesystem.check_free_space(Path(options.kept) / "kept", offloaded_bytes(options))


def check_device(options: Options) -> None:
    """Raise Failure for a device that is missing or that the engine does not support."""
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
    """The module of a peer, in this folder."""
    return importlib.import_module(PEERS[name])


def matmul_operations(options: Options, edges: int) -> float:
    """Floating-point operations in the matrix products of a forward pass, with first-layer products on nodes.

    A multiplication and an addition count as 2.
    """
    h, c = options.hidden, options.virtual_nodes
    per_edge = 3 * h + 2 * h * h + h  # squared length and e; the inner layers of φ_e and φ_x; the last layer of φ_x
    per_node = 2 * h * h + (h * h + h) + (2 + bool(c)) * h * h + 2 * h + h * h  # first layer of φ_e; φ_v; φ_h with a
    # first layer of φ_ev on h; then for each c its distance and the remaining layers
    virtual = h * h * bool(c) + c * (h + 3 * h * h + 2 * h)
    return 2.0 * options.layers * (edges * per_edge + options.nodes * (per_node + virtual)) + 6 * options.nodes * h


def measure_step(options: Options, peers: bool, log: Log = lambda line: None) -> dict[str, Any]:
    """Time our model and, with ``peers``, its peers; log(line) after each.

    Returns the options; ``place``, a note if layers' inputs go to files for lack of memory; the values of bench_worker for
    our model; gflops_forward, its matrix products per second; and ``peers``: name → the same values, …_ratio to ours and
    ``difference`` of the predictions (`differences`).
    """
    options, place = choose_offload_folder(options)
    check_options(options, peers)
    import bench_data

    if place:
        log(place)
    timed = variants(options, peers)
    if options.device != "cpu" and peers and not dgl_runs_on(options.device):
        del timed["EGNNConv"]
        log(f"EGNNConv skipped: this DGL has no build for {options.device}")
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as name:
        folder = Path(name)
        log(f"making a graph of {options.nodes:,} nodes")
        x = bench_data.block(options.nodes)
        edges = write_graphs([(x, bench_data.radius_for(x, options.degree))], folder)
        del x
        log(f"{options.nodes:,} nodes, {edges:,} edges")
        rows = {}
        for variant, one in timed.items():
            rows[variant] = row = measure_in_process({variant: one}, folder)[variant]
            log(f"{variant}: forward {row['forward_s']:.3f} s, step {row['step_s']:.3f} s, {row['peak_gb']:.2f} GB")
        difference = differences(folder, [v for v in timed if v not in ("ours", "EGNNConv")])
    ours = rows.pop("ours")
    for variant, row in rows.items():
        for key in ("forward_s", "step_s", "peak_gb"):
            row[f"{key.rsplit('_', 1)[0]}_ratio"] = row[key] / ours[key]
        if variant in difference:
            row["difference"] = difference[variant]
        for key in [key for key in row if key.startswith("machine_gflops")]:
            del row[key]
    rate = matmul_operations(options, edges) / 1e9 / ours["forward_s"]
    return {**asdict(options), **ours, "place": place, "edges": edges, "gflops_forward": rate, "peers": rows}


def write_graphs(inputs: Iterable[tuple[np.ndarray, float]], folder: Path) -> int:
    """Write radius graphs as one batch to graph.npz, from positions (N, 3) and radius of each; returns the number of edges.

    Done here and not in a worker, whose peak memory is measured.
    """
    import bench_data
    from dist_egnn.partition import neighbors

    from dist_egnn.data.edges import EdgeRule

    parts: list[dict[str, Any]] = []
    first = 0
    for seed, (x, radius) in enumerate(inputs):
        ends, src = neighbors.in_neighbors(x, EdgeRule(radius=radius), np.arange(len(x)))
        src += first
        counts = {"graph_nodes": [len(x)], "graph_edges": [len(src)], "degree": np.diff(ends).astype(np.int32)}
        parts.append({"src": src, **counts, **bench_data.node_fields(x, seed)})
        first += len(x)
    edges = sum(len(part["src"]) for part in parts)
    with zipfile.ZipFile(folder / "graph.npz", "w") as file:  # field by field: numpy.savez needs all in memory
        for name in list(parts[0]):
            with file.open(f"{name}.npy", "w", force_zip64=True) as into:
                np.lib.format.write_array(into, np.concatenate([part.pop(name) for part in parts]))
    return edges


def measure_in_process(timed: dict[str, Options], folder: Path) -> dict[str, dict[str, Any]]:
    """Run variants, alternating, in one new process (bench_worker.py); returns its values for each."""
    name = ", ".join(timed)
    threads = str(max(options.threads for options in timed.values()))
    arguments = json.dumps({variant: asdict(options) for variant, options in timed.items()})
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bench_worker.py")), str(folder), arguments],
            # torch reads the numbers of threads when it is imported
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, progress.EVENTS_VARIABLE: "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        )
        assert process.stdout is not None
        try:
            last = _show_progress(process.stdout)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        message = errors.read().strip() or "no error message"
    if code < 0:
        raise Failure(f"'{name}' was killed by signal {-code}; out of memory?")
    if code:
        raise Failure(f"'{name}': {message.splitlines()[-1].removeprefix('error: ')}")
    return json.loads(last)


def _show_progress(lines: Iterable[str]) -> str:
    """Show the progress events of a worker; returns its last other line."""
    last = title = ""
    with contextlib.ExitStack() as bars:
        for line in lines:
            if not line.startswith(progress.EVENT_PREFIX):
                last = line if line.strip() else last
                continue
            event = json.loads(line.removeprefix(progress.EVENT_PREFIX))
            if event["title"] != title:
                title = event["title"]
                bars.close()
                tick = bars.enter_context(progress.progress_bar(title, event["total"]))
            tick(event["note"], completed=event["done"])
    return last


def differences(folder: Path, names: list[str]) -> dict[str, float]:
    """Largest difference of predictions from ours, relative to the largest displacement of a node by our model."""
    with np.load(folder / "graph.npz") as graph:
        x = graph["x"]
    ours = np.load(folder / "ours.npy")
    displacement = float(np.abs(ours - x).max())
    return {name: float(np.abs(np.load(folder / f"{name}.npy") - ours).max()) / displacement for name in names}
