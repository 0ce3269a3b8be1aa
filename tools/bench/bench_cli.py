"""`python tools/bench …`: what a step, a partition, the communication and the way into a step cost on this machine.

The commands check their options, measure, and return a Report; the command line prints it.
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
Degree = Annotated[float, typer.Option(help="in-edges of a node on average; sets the radius")]
Hidden = Annotated[int, typer.Option(help="width H")]
Layers = Annotated[int, typer.Option(help="layers L")]
Virtual = Annotated[int, typer.Option(help="virtual nodes C")]
Halo = Annotated[str, typer.Option(help="bridge or exchange: whether edges between parts are kept, as partition.halo")]
Json = Annotated[bool, typer.Option("--json", help="the numbers again, as JSON on the last line")]


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[Any]]


@dataclass
class Report:
    """What a benchmark found: tables to read, lines below them, and the numbers; as_json: whether these are asked for."""

    tables: list[Table]
    notes: list[str]
    numbers: dict[str, Any]
    as_json: bool


def show_report(report: Report | None, **_: Any) -> None:
    """Print what a benchmark returned."""
    if report is None:  # only help was asked for
        return
    for table in report.tables:
        print_table(table.title, table.header, table.rows)
    for note in report.notes:
        print_line(note)
    if report.as_json:
        print(json.dumps(report.numbers))


app = typer.Typer(
    help="Measure a step, a partition, the communication, the way from a store into a step.",
    result_callback=show_report,
)


def say(line: str) -> None:
    """Progress, away from the result."""
    print(line, file=sys.stderr, flush=True)


@app.callback(invoke_without_command=True)
def options(context: typer.Context) -> None:
    """Options before the benchmark."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def check(given: dict[str, float], degree: float) -> None:
    """Raise Failure for sizes that are none. given: option → value; each is at least 1, nodes at least 2."""
    for option, value in given.items():
        if value < (low := 2 if option == "--nodes" else 1):
            raise Failure(f"{option} {value}: must be at least {low}")
    from bench_step import check_degree

    nodes = int(given["--nodes"])
    check_degree(nodes, degree)
    if nodes < given.get("--parts", 1):
        raise Failure(f"--parts {given['--parts']}: more parts than the {nodes} nodes; lower it")


@app.command(epilog=example("python tools/bench step --nodes 113140 --threads 1 --peers --json"))
def step(
    nodes: Nodes = 113_140,
    degree: Degree = 14.6,
    hidden: Hidden = 64,
    layers: Layers = 4,
    virtual_nodes: Virtual = 3,
    threads: Annotated[int, typer.Option(help="threads of the process")] = 1,
    engine: Annotated[str, typer.Option(help="auto, dgl or torch: what runs the messages")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    precision: Annotated[str, typer.Option(help="float32 or bf16-messages")] = "float32",
    tile: Annotated[int | None, typer.Option(help="rows of a tile", show_default="the model's")] = None,
    repeats: Annotated[int, typer.Option(help="timed repetitions after a warm-up; the median counts")] = 3,
    kept: Annotated[
        str | None,
        typer.Option(
            help="folder where a step keeps its layers' inputs, as train.kept; '' for memory",
            show_default="memory, or a temporary folder where there is too little",
        ),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="also time the same UDFs untiled, layers of dgl.nn.EGNNConv, and a page of plain PyTorch; with another "
            "precision or more threads also ours in float32 or on one thread",
        ),
    ] = False,
    as_json: Json = False,
) -> Report:
    """Forward without gradients, then training step of one snapshot, each variant in a process of its own; peaks are its.

    A pass of a minute or more counts by itself, without warm-up or repeats.
    """
    import bench_step

    model = (hidden, layers, virtual_nodes)
    chosen = bench_step.Options(nodes, degree, *model, threads, engine, device, precision, tile, repeats, kept=kept)
    return _step_report(bench_step.run(chosen, peers, say), as_json)


def _step_report(found: dict[str, Any], as_json: bool) -> Report:
    """The numbers of bench_step.run as a table."""
    rows = [
        [
            name,
            *(f"{row[key]:.3f}" for key in ("forward_s", "forward_peak_gb", "step_s", "peak_gb")),
            *(f"{row[key]:.2f}" if key in row else "" for key in ("forward_ratio", "step_ratio", "peak_ratio")),
            *(f"{row[key]:.0e}" if key in row else "" for key in ("difference", "equivariance_error")),
        ]
        for name, row in {"ours": found, **found["peers"]}.items()
    ]
    header = ["variant", "forward [s]", "its peak [GB]", "step [s]", "peak [GB]"]
    header += ["forward/ours", "step/ours", "peak/ours"]
    header += ["differs by", "not equivariant by"]
    shown = ("hidden", "layers", "virtual_nodes", "threads", "engine", "device", "precision", "tile", "repeats", "kept")
    settings = ", ".join(f"{key}={found[key]}" for key in shown)
    table = Table(f"{found['nodes']:,} nodes, {found['edges']:,} edges, {settings}", header, rows)
    onednn = found.get("machine_gflops_onednn")
    note = (
        f"forward: {found['gflops_forward']:.0f} GFLOP/s in products; 64-wide products alone reach "
        f"{found['machine_gflops']:.0f} here" + (f", {onednn:.0f} by oneDNN" if onednn else "")
    )
    notes = [note, found["place"]] if found["place"] else [note]
    if found["once"]:
        notes.append(
            f"{' and '.join(found['once'])}: one pass took a minute or more and counted by itself, without warm-up or repeats; "
            f"its tiles were cut before, in {found['tiles_s']:.1f} s"
        )
    return Report([table], notes, found, as_json)


@app.command(epilog=example("python tools/bench batch --graphs 100 --repeats 9 --json"))
def batch(
    graphs: Annotated[int, typer.Option(help="N-body graphs of a batch, fewer where untiled does not fit")] = 250,
    nodes: Annotated[int, typer.Option(help="nodes of an N-body graph, which is complete")] = 100,
    hidden: Hidden = 64,
    layers: Layers = 4,
    virtual_nodes: Virtual = 3,
    threads: Annotated[int, typer.Option(help="threads of each process")] = 1,
    engine: Annotated[str, typer.Option(help="auto, dgl or torch: what runs the messages")] = "auto",
    repeats: Annotated[int, typer.Option(help="timed repetitions at least, after a warm-up; small cases get more")] = 5,
    as_json: Json = False,
) -> Report:
    """Small graphs, batched and single: tiles against untiled, taking turns in one process a case."""
    check({"--graphs": graphs, "--nodes": nodes}, 1)
    import bench_batch
    import bench_step

    model: dict[str, Any] = {"hidden": hidden, "layers": layers, "virtual_nodes": virtual_nodes}
    model |= {"threads": threads, "engine": engine}
    chosen = bench_step.Options(**model, repeats=repeats)
    found = bench_batch.run(graphs, nodes, chosen, say)
    rows = [
        [
            *(row["case"], *(f"{row[key]:,}" for key in ("graphs", "nodes", "edges", "repeats"))),
            *(f"{1e3 * row[way][key]:,.1f}" for key in ("forward_s", "step_s") for way in ("tiled", "untiled")),
            *(f"{row['forward_ratio']:.2f}", f"{row['step_ratio']:.2f}", f"{row['difference']:.0e}"),
        ]
        for row in found["rows"]
    ]
    times = ["forward [ms]", "untiled", "step [ms]", "untiled", "forward ratio", "step ratio", "differs by"]
    settings = ", ".join(f"{key}={found[key]}" for key in model)
    table = Table(
        f"median times, tiled and untiled; ratio: median of untiled/tiled, turn by turn; {settings}",
        ["case", "graphs", "nodes", "edges", "repeats", *times],
        rows,
    )
    return Report([table], found["notes"], found, as_json)


@app.command(epilog=example("python tools/bench models --nodes 10000 --json"))
def models(
    nodes: Annotated[int, typer.Option(help="nodes of the fluid, particles on a jittered lattice")] = 10_000,
    degree: Annotated[float, typer.Option(help="in-edges of its nodes on average; sets the radius")] = 15,
    graphs: Annotated[int, typer.Option(help="N-body graphs of a batch, complete graphs of 100 nodes")] = 10,
    hidden: Hidden = 64,
    layers: Layers = 4,
    virtual_nodes: Virtual = 3,
    only: Annotated[
        list[str] | None,
        typer.Option("--model", help="a model; may be given several times, also MODULE:CLASS", show_default="all"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="timed repetitions after a warm-up; the median counts")] = 3,
    as_json: Json = False,
) -> Report:
    """Every model on a batch of N-body graphs and on a fluid: parameters, time, memory, equivariance error.

    One thread, float32, a process for each. Equivariance errors are measured with last weights of full size, which start near
    zero, and are in units of the farthest that the model moves a node.
    """
    check({"--nodes": nodes, "--graphs": graphs}, degree)
    import bench_models
    import bench_step

    sizes: dict[str, Any] = {"hidden": hidden, "layers": layers, "virtual_nodes": virtual_nodes, "repeats": repeats}
    found = bench_models.run(bench_step.Options(nodes, degree, **sizes), graphs, only, say)
    header = ["model", "parameters", "forward [s]", "step [s]", "peak [GB]", "not equivariant by", "in float64"]
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
        for case in found["cases"]
    ]
    return Report(tables, found["notes"], found, as_json)


@app.command(epilog=example("python tools/bench partition --nodes 113140 --nodes 1000000 --parts 8"))
def partition(
    nodes: Annotated[
        list[int] | None,
        typer.Option(help="nodes of the graph; may be given several times", show_default="113140"),
    ] = None,
    degree: Degree = 14.6,
    parts: Annotated[int, typer.Option(help="parts")] = 8,
    as_json: Json = False,
) -> Report:
    """Every method's time and cut, and the time to write a store of one snapshot by METIS."""
    sizes = nodes or [113_140]
    for size in sizes:
        check({"--nodes": size, "--parts": parts}, degree)
    memory.require_memory(
        0.5e9 + max(sizes) * (degree * 150 + 500), "cpu", f"a graph of {max(sizes):,} nodes", "lower --nodes"
    )
    import bench_pipeline

    found = [bench_pipeline.partition(size, degree, parts, say) for size in sizes]
    header = ["method", "seconds", "edges cut", "largest/mean", "halo/nodes"]
    tables = [
        Table(
            f"{one['nodes']:,} nodes, {one['edges']:,} edges, {parts} parts; store of this snapshot by METIS, "
            f"from positions to the last file: {one['store_s']:.2f} s",
            header,
            [
                [name, f"{q['seconds']:.3f}", f"{q['edge_cut']:.1%}", f"{q['balance']:.3f}", f"{q['halo']:.1%}"]
                for name, q in one["methods"].items()
            ],
        )
        for one in found
    ]
    return Report(tables, [], {"degree": degree, "sizes": found}, as_json)


def _room(nodes: int, degree: float, hidden: int, layers: int, parts: int, halo: str) -> None:
    """Raise Failure for an unknown mode, and where there is no memory for a step on so many processes."""
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
    """Count the collectives of one training step and what each carries."""
    model = {"hidden": hidden, "layers": layers, "virtual_nodes": virtual_nodes}
    sizes = {"--hidden": hidden, "--layers": layers, "--virtual-nodes": virtual_nodes}
    check({"--nodes": nodes, "--parts": parts, **sizes}, degree)
    if parts < 2:
        raise Failure(f"--parts {parts}: must be at least 2: one process sends nothing")
    _room(nodes, degree, hidden, layers, parts, halo)
    import bench_pipeline

    found = bench_pipeline.communication(nodes, degree, parts, model, halo)
    rows = [
        [phase, one["calls"], " ".join(one["collectives"]), _runs(one["floats"]), f"{one['bytes']:,}"]
        for phase, one in found["phases"].items()
    ]
    header = ["phase", "calls", "collective", "numbers in each", "bytes"]
    table = Table(f"one training step of one graph on {parts} processes, as each sends it", header, rows)
    note = f"by the formula {layers} calls of (P - 1)(3 + 3C + HC) = {found['formula']} numbers, forward and backward"
    if halo == "exchange":
        note += "; beside them an all-to-all of H + 3 numbers for each node that another process needs, and back, of H in the first"
    others = [] if found["alike"] else ["processes differ in what they send: shown is the first"]
    return Report([table], [note, *others], found, as_json)


def _runs(numbers: list[int]) -> str:
    """Equal numbers once: 204 204 204 is 204."""
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
    repeats: Annotated[int, typer.Option(help="timed steps, each on a snapshot of its own")] = 5,
    as_json: Json = False,
) -> Report:
    """Steps with a new stored snapshot each, against steps on one fixed graph."""
    model = {"hidden": hidden, "layers": layers, "virtual_nodes": virtual_nodes}
    sizes = {"--hidden": hidden, "--layers": layers, "--virtual-nodes": virtual_nodes, "--repeats": repeats}
    check({"--nodes": nodes, "--parts": parts, **sizes}, degree)
    _room(nodes, degree, hidden, layers, parts, halo)
    import bench_pipeline

    found = bench_pipeline.pipeline(nodes, degree, parts, repeats, model, say, halo)
    labels = {
        "fixed_s": "step on a fixed graph",
        "fresh_s": "step with a new snapshot each time",
        "read_s": "  read from disk (checked), mean of a snapshot",
        "graph_s": "  its graph and fields",
        "tiles_s": "  its tiles",
        "edges_s": "  its edges once more, from positions: what storing them saves",
    }
    rows = [[label, f"{found[key]:.3f}"] for key, label in labels.items()]
    table = Table(f"{nodes:,} nodes, processes: {parts}, mean of {repeats} steps", ["what", "seconds"], rows)
    return Report([table], [f"new snapshot / fixed graph: {found['ratio']:.3f}"], found, as_json)
