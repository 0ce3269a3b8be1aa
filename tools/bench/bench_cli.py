"""`python tools/bench …` measures a training step, partitioning, communication and the data pipeline on this machine.

Each command checks its options, measures, and returns a Report, which the command line prints.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from dist_egnn.errors import Failure
from dist_egnn.utils import memory
from dist_egnn.utils.console import example, print_line, print_table

Nodes = Annotated[int, typer.Option(help="nodes of the graph, particles on a jittered lattice")]
Degree = Annotated[float, typer.Option(help="mean in-edges of a node; sets the radius")]
Hidden = Annotated[int, typer.Option(help="width H")]
Layers = Annotated[int, typer.Option(help="layers L")]
Virtual = Annotated[int, typer.Option(help="virtual nodes C")]
Halo = Annotated[str, typer.Option(help="bridge or exchange, as partition.halo: whether edges between parts are kept")]
Json = Annotated[bool, typer.Option("--json", help="also print the numbers as JSON on the last line")]


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[Any]]


@dataclass
class Report:
    """The result of a benchmark: tables, lines below them, and the numbers, which are printed if as_json."""

    tables: list[Table]
    notes: list[str]
    numbers: dict[str, Any]
    as_json: bool


def show_report(report: Report | None, **_: Any) -> None:
    """Print the report of a benchmark."""
    if report is None:  # only the help was printed
        return
    for table in report.tables:
        print_table(table.title, table.header, table.rows)
    for note in report.notes:
        print_line(note)
    if report.as_json:
        print(json.dumps(report.numbers))


app = typer.Typer(
    help="Measure a training step, partitioning, communication and the data pipeline.",
    result_callback=show_report,
)


def log(line: str) -> None:
    """Print progress to standard error."""
    print(line, file=sys.stderr, flush=True)


@app.callback(invoke_without_command=True)
def options(context: typer.Context) -> None:
    """Options before the benchmark."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def check_sizes(sizes: dict[str, float], degree: float) -> None:
    """Raise Failure for invalid sizes. sizes: option → value; each must be at least 1, --nodes at least 2."""
    for option, value in sizes.items():
        if value < (low := 2 if option == "--nodes" else 1):
            raise Failure(f"{option} {value}: must be at least {low}")
    from bench_step import check_degree

    nodes = int(sizes["--nodes"])
    check_degree(nodes, degree)
    if nodes < sizes.get("--parts", 1):
        raise Failure(f"--parts {sizes['--parts']}: more parts than the {nodes} nodes; lower it")


@app.command(epilog=example("python tools/bench step --nodes 113140 --threads 1 --peers --json"))
def step(
    nodes: Nodes = 113_140,
    degree: Degree = 14.6,
    hidden: Hidden = 64,
    layers: Layers = 4,
    virtual_nodes: Virtual = 3,
    threads: Annotated[int, typer.Option(help="threads of the process")] = 1,
    engine: Annotated[str, typer.Option(help="auto, native, torch or dgl: library that runs message passing")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    precision: Annotated[str, typer.Option(help="float32 or bf16-messages")] = "float32",
    tile: Annotated[int | None, typer.Option(help="edges of a tile", show_default="the model's")] = None,
    repeats: Annotated[int, typer.Option(help="timed repetitions after a warm-up; the median is reported")] = 3,
    kept: Annotated[
        str | None,
        typer.Option(
            help="folder for the inputs of layers that a step keeps, as train.kept; '' for memory",
            show_default="memory, or a temporary folder if memory is too small",
        ),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="also time the model by the torch engine, tiled and untiled, in bf16-messages and on 2 threads (or in float32 "
            "and on one thread), layers of dgl.nn.EGNNConv, and a plain PyTorch implementation",
        ),
    ] = False,
    clock: Annotated[
        str, typer.Option(help="wall, or processor: its seconds for all threads, on a machine that others use")
    ] = "wall",
    as_json: Json = False,
) -> Report:
    """Time a forward pass without gradients and a training step of one snapshot, each variant in its own process.

    A pass of a minute or more is measured once, without warm-up or repeats.
    """
    import bench_step

    model = (hidden, layers, virtual_nodes)
    settings = bench_step.Options(
        nodes, degree, *model, threads, engine, device, precision, tile, repeats, kept=kept, clock=clock
    )
    return _step_report(bench_step.measure_step(settings, peers, log), as_json)


def _step_report(result: dict[str, Any], as_json: bool) -> Report:
    """The values of bench_step.measure_step as a table."""
    rows = [
        [
            name,
            *(f"{row[key]:.3f}" for key in ("forward_s", "forward_peak_gb", "step_s", "peak_gb")),
            *(f"{row[key]:.2f}" if key in row else "" for key in ("forward_ratio", "step_ratio", "peak_ratio")),
            *(f"{row[key]:.0e}" if key in row else "" for key in ("difference", "equivariance_error")),
        ]
        for name, row in {"ours": result, **result["peers"]}.items()
    ]
    header = ["variant", "forward [s]", "forward peak [GB]", "step [s]", "step peak [GB]"]
    header += ["forward/ours", "step/ours", "peak/ours"]
    header += ["difference", "equivariance error"]
    shown = ("hidden", "layers", "virtual_nodes", "threads", "engine", "device", "precision", "tile", "repeats", "kept")
    settings = ", ".join(f"{key}={result[key]}" for key in (*shown, "clock"))
    table = Table(f"{result['nodes']:,} nodes, {result['edges']:,} edges, {settings}", header, rows)
    rates = {"oneDNN": result.get("machine_gflops_onednn"), "the native kernel": result.get("machine_gflops_native")}
    note = (
        f"forward: {result['gflops_forward']:.0f} GFLOP/s in matrix products; 64-wide products alone reach "
        f"{result['machine_gflops']:.0f} on one thread of this machine"
        + "".join(f", {rate:.0f} with {name}" for name, rate in rates.items() if rate)
    )
    notes = [note, result["place"]] if result["place"] else [note]
    if result["once"]:
        notes.append(
            f"{' and '.join(result['once'])}: a pass took a minute or more and was measured once, without warm-up or repeats; "
            f"its tiles were made before, in {result['tiles_s']:.1f} s"
        )
    return Report([table], notes, result, as_json)


@app.command(epilog=example("python tools/bench batch --graphs 100 --repeats 9 --json"))
def batch(
    graphs: Annotated[
        int, typer.Option(help="N-body graphs of a batch; fewer if they do not fit into memory untiled")
    ] = 250,
    nodes: Annotated[int, typer.Option(help="nodes of an N-body graph (complete)")] = 100,
    hidden: Hidden = 64,
    layers: Layers = 4,
    virtual_nodes: Virtual = 3,
    threads: Annotated[int, typer.Option(help="threads of each process")] = 1,
    engine: Annotated[str, typer.Option(help="auto, native, torch or dgl: library that runs message passing")] = "auto",
    repeats: Annotated[
        int, typer.Option(help="minimum of timed repetitions after a warm-up; small cases get more")
    ] = 5,
    as_json: Json = False,
) -> Report:
    """Compare tiled, untiled and the torch engine's message passing on small graphs, alternating in one process per case."""
    check_sizes({"--graphs": graphs, "--nodes": nodes}, 1)
    import bench_batch
    import bench_step

    model: dict[str, Any] = {"hidden": hidden, "layers": layers, "virtual_nodes": virtual_nodes}
    model |= {"threads": threads, "engine": engine}
    model_options = bench_step.Options(**model, repeats=repeats)
    result = bench_batch.measure_batches(graphs, nodes, model_options, log)
    rows = [
        [
            *(row["case"], *(f"{row[key]:,}" for key in ("graphs", "nodes", "edges", "repeats"))),
            *(
                f"{1e3 * row[kind][key]:,.1f}"
                for key in ("forward_s", "step_s")
                for kind in ("tiled", "untiled", "torch")
            ),
            *(f"{row[f'{kind}{key}_ratio']:.2f}" for key in ("forward", "step") for kind in ("", "torch_")),
            f"{row['difference']:.0e}",
        ]
        for row in result["rows"]
    ]
    times = ["forward [ms]", "untiled", "torch", "step [ms]", "untiled", "torch"]
    times += ["forward ratio", "torch", "step ratio", "torch", "difference"]
    settings = ", ".join(f"{key}={result[key]}" for key in model)
    table = Table(
        f"median times, tiled, untiled and by the torch engine; ratio: median of theirs to tiled over repetitions; {settings}",
        ["case", "graphs", "nodes", "edges", "repeats", *times],
        rows,
    )
    return Report([table], result["notes"], result, as_json)


@app.command(epilog=example("python tools/bench models --nodes 10000 --json"))
def models(
    nodes: Annotated[int, typer.Option(help="nodes of the fluid, particles on a jittered lattice")] = 10_000,
    degree: Annotated[float, typer.Option(help="mean in-edges of its nodes; sets the radius")] = 15,
    graphs: Annotated[int, typer.Option(help="N-body graphs of a batch, complete graphs of 100 nodes")] = 10,
    hidden: Hidden = 64,
    layers: Layers = 4,
    virtual_nodes: Virtual = 3,
    only: Annotated[
        list[str] | None,
        typer.Option("--model", help="a model or MODULE:CLASS; may be repeated", show_default="all"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="timed repetitions after a warm-up; the median is reported")] = 3,
    as_json: Json = False,
) -> Report:
    """Measure parameters, time, memory and equivariance error of every model on a batch of N-body graphs and on a fluid.

    One thread, float32, each model in its own process. The last weights start near zero; for equivariance errors they have
    full size. Errors are relative to the largest displacement of a node by the model.
    """
    check_sizes({"--nodes": nodes, "--graphs": graphs}, degree)
    import bench_models
    import bench_step

    sizes: dict[str, Any] = {"hidden": hidden, "layers": layers, "virtual_nodes": virtual_nodes, "repeats": repeats}
    result = bench_models.measure_models(bench_step.Options(nodes, degree, **sizes), graphs, only, log)
    header = ["model", "parameters", "forward [s]", "step [s]", "peak [GB]", "equivariance error", "in float64"]
    settings = ", ".join(f"{key}={value}" for key, value in sizes.items())
    tables = [
        Table(
            f"{case['case']}: {case['nodes']:,} nodes, {case['edges']:,} edges; {settings}",
            header,
            [
                [
                    *(name, f"{row['parameters']:,}", *(f"{row[key]:.3f}" for key in ("forward_s", "step_s"))),
                    f"{row['peak_gb']:.2f}",
                    *(f"{row[key]:.0e}" for key in ("equivariance_error", "equivariance_error_float64")),
                ]
                for name, row in case["models"].items()
            ],
        )
        for case in result["cases"]
    ]
    return Report(tables, result["notes"], result, as_json)


@app.command(epilog=example("python tools/bench partition --nodes 113140 --nodes 1000000 --parts 8"))
def partition(
    nodes: Annotated[
        list[int] | None,
        typer.Option(help="nodes of the graph; may be repeated", show_default="113140"),
    ] = None,
    degree: Degree = 14.6,
    parts: Annotated[int, typer.Option(help="number of parts")] = 8,
    as_json: Json = False,
) -> Report:
    """Measure the time and the edge cut of every method, and the time to write a store of one snapshot with METIS."""
    sizes = nodes or [113_140]
    for size in sizes:
        check_sizes({"--nodes": size, "--parts": parts}, degree)
    memory.require_memory(
        0.5e9 + max(sizes) * (degree * 150 + 500), "cpu", f"a graph of {max(sizes):,} nodes", "lower --nodes"
    )
    import bench_partition

    results = [bench_partition.measure_methods(size, degree, parts, log) for size in sizes]
    header = ["method", "seconds", "edges cut", "largest/mean", "halo/nodes"]
    tables = [
        Table(
            f"{one['nodes']:,} nodes, {one['edges']:,} edges, {parts} parts; store of this snapshot with METIS, "
            f"from positions to the last file: {one['store_s']:.2f} s",
            header,
            [
                [name, f"{q['seconds']:.3f}", f"{q['edge_cut']:.1%}", f"{q['balance']:.3f}", f"{q['halo']:.1%}"]
                for name, q in one["methods"].items()
            ],
        )
        for one in results
    ]
    return Report(tables, [], {"degree": degree, "sizes": results}, as_json)


def _check_processes(nodes: int, degree: float, hidden: int, layers: int, parts: int, halo: str) -> None:
    """Raise Failure for an unknown halo mode, and if memory does not suffice for a step on all processes."""
    import bench_step

    from dist_egnn.config import HALOS

    if halo not in HALOS:
        raise Failure(f"--halo {halo}: unknown; use {' or '.join(HALOS)}")
    needed = bench_step.memory_needed("ours", bench_step.Options(nodes, degree, hidden, layers)) + 0.4e9 * parts
    memory.require_memory(needed, "cpu", f"a graph of {nodes:,} nodes", "lower --nodes, --hidden or --layers")


@app.command(epilog=example("python tools/bench comm --parts 4"))
def comm(
    nodes: Nodes = 2000,
    degree: Degree = 14.6,
    parts: Annotated[int, typer.Option(help="processes, at least 2")] = 2,
    hidden: Hidden = 64,
    layers: Layers = 4,
    virtual_nodes: Virtual = 3,
    halo: Halo = "bridge",
    as_json: Json = False,
) -> Report:
    """Count the collective calls of one training step and the numbers that each sends."""
    model = {"hidden": hidden, "layers": layers, "virtual_nodes": virtual_nodes}
    sizes = {"--hidden": hidden, "--layers": layers, "--virtual-nodes": virtual_nodes}
    check_sizes({"--nodes": nodes, "--parts": parts, **sizes}, degree)
    if parts < 2:
        raise Failure(f"--parts {parts}: must be at least 2: one process sends nothing")
    _check_processes(nodes, degree, hidden, layers, parts, halo)
    import bench_comm

    result = bench_comm.measure_communication(nodes, degree, parts, model, halo)
    rows = [
        [phase, one["calls"], " ".join(one["collectives"]), _distinct(one["floats"]), f"{one['bytes']:,}"]
        for phase, one in result["phases"].items()
    ]
    header = ["phase", "calls", "collective", "numbers in each", "bytes"]
    table = Table(f"one training step of one graph on {parts} processes, as sent by each", header, rows)
    note = f"formula: {layers} calls of (P - 1)(3 + 3C + HC) = {result['formula']} numbers, forward and backward"
    if halo == "exchange":
        note += "; also an all-to-all of H + 3 numbers for each halo node, and back, of H in the first layer"
    others = [] if result["alike"] else ["processes send different amounts; this is the first process"]
    return Report([table], [note, *others], result, as_json)


def _distinct(numbers: list[int]) -> str:
    """Each value once: 204 204 204 is 204."""
    return " ".join(f"{n:,}" for n in dict.fromkeys(numbers)) or "-"


@app.command(epilog=example("python tools/bench pipeline --nodes 113140 --repeats 5"))
def pipeline(
    nodes: Nodes = 113_140,
    degree: Degree = 14.6,
    parts: Annotated[int, typer.Option(help="processes, one part each")] = 1,
    hidden: Hidden = 64,
    layers: Layers = 4,
    virtual_nodes: Virtual = 3,
    halo: Halo = "bridge",
    engine: Annotated[str, typer.Option(help="auto, native, torch or dgl: library that runs message passing")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    repeats: Annotated[int, typer.Option(help="timed steps, each on a different snapshot")] = 5,
    as_json: Json = False,
) -> Report:
    """Compare steps that each read a new snapshot from a store with steps on one fixed graph."""
    model = {"hidden": hidden, "layers": layers, "virtual_nodes": virtual_nodes}
    sizes = {"--hidden": hidden, "--layers": layers, "--virtual-nodes": virtual_nodes, "--repeats": repeats}
    check_sizes({"--nodes": nodes, "--parts": parts, **sizes}, degree)
    _check_processes(nodes, degree, hidden, layers, parts, halo)
    import bench_pipeline
    import bench_step

    bench_step.check_device(bench_step.Options(engine=engine, device=device))
    keys = {**model, "engine": engine}
    result = bench_pipeline.measure_pipeline(nodes, degree, parts, repeats, keys, log, halo, device)
    labels = {
        "fixed_s": "step on a fixed graph",
        "fresh_s": "step with a new snapshot",
        "read_s": "  read from disk and verify",
        "graph_s": "  make the graph and its fields",
        "tiles_s": "  make its tiles",
        "edges_s": "  (edges from positions, which the store saves)",
    }
    rows = [[label, f"{result[key]:.3f}"] for key, label in labels.items()]
    table = Table(f"{nodes:,} nodes, {parts} processes, mean of {repeats} steps", ["stage", "seconds"], rows)
    return Report([table], [f"new snapshot / fixed graph: {result['ratio']:.3f}"], result, as_json)


@app.command(epilog=example("python tools/bench rollout --nodes 113140 --parts 2 --json"))
def rollout(
    nodes: Nodes = 113_140,
    degree: Degree = 14.6,
    parts: Annotated[int, typer.Option(help="processes, one part each")] = 2,
    name: Annotated[str, typer.Option("--model", help="the backbone, as model.name")] = "EGNN",
    hidden: Hidden = 32,
    layers: Layers = 3,
    virtual_nodes: Virtual = 3,
    halo: Halo = "bridge",
    steps: Annotated[int, typer.Option(help="steps of the rollout")] = 10,
    repartition: Annotated[int, typer.Option(help="steps between partitions")] = 10,
    as_json: Json = False,
) -> Report:
    """Time the steps of a simulator's rollout by phase: neighbour search, partition, exchange, model, watch, writing."""
    counts = {"--hidden": hidden, "--layers": layers, "--virtual-nodes": virtual_nodes, "--steps": steps}
    check_sizes({"--nodes": nodes, "--parts": parts, "--repartition": repartition, **counts}, degree)
    _check_processes(nodes, degree, hidden, layers, parts, halo)
    import bench_rollout

    model = {"name": name, "hidden": hidden, "layers": layers}
    model |= {"virtual_nodes": virtual_nodes} if name.startswith("Fast") else {}
    result = bench_rollout.measure_rollout(nodes, degree, parts, steps, repartition, halo, model)
    rows = [[phase, f"{one['cpu_s']:.3f}", f"{one['wall_s']:.3f}"] for phase, one in result["phases"].items()]
    rows.append(["step, without writing", f"{result['cpu_s']:.3f}", f"{result['wall_s']:.3f}"])
    title = f"a step of {nodes:,} particles on {parts} processes, mean of {steps}; the slowest process"
    table = Table(title, ["phase", "processor [s]", "elapsed [s]"], rows)
    return Report(
        [table], [f"search, partition and exchange: {result['share']:.0%} of the processor's time"], result, as_json
    )
