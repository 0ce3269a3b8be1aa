"""The command line: `distegnn …`. What it does is in the modules; this parses, prints and turns failures into one line."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from . import bench
from .errors import Failure

# one thread a process unless the user says otherwise: DGL's kernels lose most of their speed when threads outnumber cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

app = typer.Typer(
    help="Train equivariant graph networks on geometric graphs too large for one device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Overrides = Annotated[list[str] | None, typer.Argument(help="config keys to set, as key=value", show_default=False)]


@app.callback()
def main_options(
    debug: Annotated[bool, typer.Option("--debug", help="show a traceback when something fails")] = False,
) -> None:
    """Options before the command."""


def print_table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    """A table that reads well on a terminal and in a pipe."""
    cells = [header, *[[str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    if title:
        print(title)
    for k, row in enumerate(cells):
        print(
            "  "
            + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        )
        if k == 0:
            print("  " + "  ".join("-" * w for w in widths))


@app.command(epilog="Example: distegnn partition recipes/fluid113k/sample.h5 --parts 8 --radius 0.075 --out store")
def partition(
    data: Annotated[Path, typer.Argument(help="trajectories.h5, as a recipe's prepare.py writes it")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="folder of the store (needed unless --compare)")] = None,
    parts: Annotated[int, typer.Option(help="parts of each graph: one process each in training")] = 2,
    method: Annotated[
        str,
        typer.Option(
            help="metis; random; kmeans; spectral (above 2,000 nodes on a sample of them, the rest follow the nearest); "
            "bisection (recursive, by coordinates); morton (ranges of a Z-order curve)"
        ),
    ] = "metis",
    config: Annotated[Path | None, typer.Option(help="take the data section of this config; options below win")] = None,
    radius: Annotated[
        float | None, typer.Option(help="edges join nodes up to this distance (inf: complete graph)")
    ] = None,
    horizon: Annotated[int | None, typer.Option(help="frames from input to target")] = None,
    features: Annotated[
        str | None, typer.Option(help="input features, comma-separated: attributes, speed, NAME/max")
    ] = None,
    node_attributes: Annotated[
        str | None, typer.Option(help="node attributes read by every layer, comma-separated")
    ] = None,
    edge_drop: Annotated[float | None, typer.Option(help="share of the longest edges to drop")] = None,
    frames: Annotated[int | None, typer.Option(help="random input frames per trajectory; 0: all")] = None,
    last_frame: Annotated[
        int | None, typer.Option(help="last frame that may be an input; -1: as far as targets exist")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of random, kmeans and spectral")] = 0,
    shard_nodes: Annotated[
        int | None,
        typer.Option(
            help="nodes per DistDGL graph; 0: all snapshots in one, as a graph server needs it", show_default="262,144"
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="only show all methods on the first snapshot")] = False,
) -> None:
    """Cut every snapshot into parts and write a store that DistDGL reads too."""
    from . import config as configs

    options = {
        "radius": radius,
        "horizon": horizon,
        "features": f"[{features}]" if features is not None else None,
        "node_attributes": f"[{node_attributes}]" if node_attributes is not None else None,
        "edge_drop": edge_drop,
        "frames": frames,
        "last_frame": last_frame,
    }
    if config is None and radius is None:
        raise Failure("--radius is missing: name it (inf joins every pair of nodes), or give a --config")
    given = [f"data.{k}={v}" for k, v in options.items() if v is not None]
    settings = configs.load(config, [*given, *(overrides or ())]).data
    from .partition import build
    from .trajectories import Trajectories

    file = Trajectories(data)
    inputs = build.inputs_of(
        file,
        parts=parts,
        method=method,
        method_seed=seed,
        settings=settings,
        shard_nodes=build.SHARD_NODES if shard_nodes is None else shard_nodes,
    )
    if compare:
        rows = build.compare(file, inputs)
        print_table(
            f"first snapshot of {data}, {parts} parts",
            ["method", "edges cut", "largest/mean", "halo/nodes", "seconds"],
            [[name, f"{q.edge_cut:.1%}", f"{q.balance:.3f}", f"{q.halo_share:.1%}", f"{s:.2f}"] for name, q, s in rows],
        )
        return
    if out is None:
        raise Failure("--out is missing: name the folder of the store, for example --out store")
    make_store(file, out, inputs)


def make_store(file: Any, out: Path, inputs: Any) -> None:
    """Write a store with a progress display and say what it holds."""
    from .partition import build
    from .progress import bar
    from .store import Store

    started = time.perf_counter()
    with bar("partitioning", len(build.listing(file, inputs))) as tick:
        fresh = build.write(file, out, inputs, lambda done, _all: tick(to=done))
    store = Store(out)
    if not fresh:
        print(f"{out}: complete already, nothing to do")
    found = store.summary()
    print_table(
        f"{out}: {len(store.snapshots)} snapshots in {store.parts} parts, {time.perf_counter() - started:.1f} s",
        ["method", "edges cut", "largest/mean", "halo/nodes"],
        [[store.inputs["method"], f"{found['edge_cut']:.1%}", f"{found['balance']:.3f}", f"{found['halo']:.1%}"]],
    )


@app.command(epilog="Example: distegnn verify store --model recipes/fluid113k/config.yaml")
def verify(
    store: Annotated[Path, typer.Argument(help="folder of a store")],
    model: Annotated[
        Path | None, typer.Option(help="config whose model is run on P processes and on one, and compared in float64")
    ] = None,
    overrides: Overrides = None,
    snapshot: Annotated[
        int | None, typer.Option(help="snapshot that the model is compared on", show_default="the middle one")
    ] = None,
) -> None:
    """Re-check a store: hashes, every node and edge exactly once; with --model, that P processes equal one."""
    from . import config as configs

    if model is None and (overrides or snapshot is not None):
        raise Failure("--snapshot and config keys are for the comparison of a model: name its config with --model")
    run_verification(store, configs.load(model, overrides or ()) if model else None, snapshot)


def run_verification(path: Path, config: Any, snapshot: int | None = None) -> None:
    """Check a store and, with a config, its model's exactness over partitions; prints what was found."""
    from .partition.verify import verify as check
    from .progress import bar
    from .store import Store

    store = Store(path)
    if snapshot is None:
        snapshot = len(store.snapshots) // 2  # the first may be more symmetric than most: a weaker test
    if not 0 <= snapshot < len(store.snapshots):
        raise Failure(f"--snapshot {snapshot}: {path} has snapshots 0 to {len(store.snapshots) - 1}")
    with bar("verifying", len(store.snapshots)) as tick:
        counted = check(store, lambda done, _all: tick(to=done))
    print(f"{path}: whole: " + ", ".join(f"{n:,} {what}" for what, n in counted.items()))
    if config is None:
        return
    from . import exactness

    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        found = exactness.compare(config, store, snapshot, Path(folder))
    gradients = {k: v for k, v in found.items() if k.startswith("gradient")}
    worst = max(gradients, key=lambda k: gradients[k])
    rows = [[k, f"{v:.1e}"] for k, v in found.items() if k not in gradients]
    print_table(
        f"{store.parts} processes against one on the same cut graph, float64, snapshot {snapshot}",
        ["compared", "largest relative error"],
        [*rows, [f"{len(gradients)} gradients, worst {worst.removeprefix('gradient ')}", f"{gradients[worst]:.1e}"]],
    )
    # not `max(…) > …`: what is NaN is wrong too
    wrong = [k for k, v in found.items() if not v <= exactness.TOLERANCE]
    if wrong:
        raise Failure(
            f"{path}: {wrong[0]} differs by {found[wrong[0]]:.1e}, more than "
            f"{exactness.TOLERANCE:.0e}: P processes do not compute what one does; please report this"
        )


@app.command(
    epilog="Example: distegnn train recipes/fluid113k/config.yaml data.path=store train.epochs=10 run.dir=runs/fluid"
)
def train(
    config: Annotated[Path, typer.Argument(help="a recipe's config.yaml; `distegnn config` prints every key")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from run.dir/last.pt")] = False,
) -> None:
    """Train a model; several parts mean several processes, one per part."""
    from . import config as configs

    run_training(configs.load(config, overrides or ()), resume)


def run_training(config: Any, resume: bool = False) -> dict[str, float]:
    """Partition if need be, train on as many processes as there are parts, and say where the results are."""
    from . import local, models, samples
    from . import train as training

    models.named(config.model.name)
    training.device_of(config)
    folder = Path(config.run.dir)
    if config.data.path:
        config.data.path = str(Path(config.data.path).absolute())  # the run is evaluated from anywhere
    if (folder / "config.yaml").exists() and not resume:
        raise Failure(f"{folder}: holds a run already; choose another run.dir, or --resume it")
    parts = samples.parts(config)
    if parts > 1 and not samples.is_store(config.data.path):
        from .partition import build
        from .trajectories import Trajectories

        file = Trajectories(config.data.path)
        inputs = build.inputs_of(
            file,
            parts=parts,
            method=config.partition.method,
            method_seed=config.partition.seed,
            settings=config.data,
            shard_nodes=build.SHARD_NODES,
        )
        make_store(file, folder / "store", inputs)
        config.data.path = str((folder / "store").absolute())
    last = local.run(training.train, parts, config, resume, timeout_s=config.train.timeout_s)[0]
    on = "1 process" if parts == 1 else f"{parts} processes"
    print(f"{folder}: best validation MSE {last['best_valid_mse']:.4e}, {last.get('step_s', 0):.3f} s a step on {on}")
    return last


@app.command(epilog="Example: distegnn evaluate runs/fluid")
def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
) -> None:
    """The best checkpoint's error on every test sample, beside the static and the linear prediction."""
    found = run_evaluation(run, split)
    rows = [[name, f"{value:.4e}", f"{value / found['linear']:.3f}"] for name, value in found.items()]
    print_table(f"{run}: mean squared error, split {split}", ["prediction", "MSE", "of linear"], rows)


def run_evaluation(run: Path, split: str = "test") -> dict[str, float]:
    """Errors of a run's best checkpoint by name, on as many processes as it was trained on; also in evaluate.csv."""
    import pandas as pd

    from . import config as configs
    from . import local, samples
    from . import train as training
    from .trajectories import SPLITS

    if split not in SPLITS:
        raise Failure(f"--split {split}: use one of {', '.join(SPLITS)}")
    if not (run / "config.yaml").is_file():
        raise Failure(f"{run}: not a run (no config.yaml); `distegnn train` makes one")
    config = configs.load(run / "config.yaml")
    config.run.dir = str(run)
    try:
        training.device_of(config)
    except Failure as failure:  # nothing on this command line sets it: the run's file does
        raise Failure(f"{run / 'config.yaml'}: {failure}") from failure
    parts = samples.parts(config)
    found = local.run(training.evaluate, parts, config, run / "best.pt", split, timeout_s=config.train.timeout_s)[0]
    table, path = (
        pd.DataFrame([{"split": split, "prediction": k, "mse": v} for k, v in found.items()]),
        run / "evaluate.csv",
    )
    if path.is_file():
        before = pd.read_csv(path)
        table = pd.concat([before[before["split"] != split], table])
    table.to_csv(path, index=False)
    return found


@app.command("config", epilog="Example: distegnn config train.epochs=10 > my.yaml")
def show_config(overrides: Overrides = None) -> None:
    """Print every config key with its default and what it means."""
    from . import config as configs

    print(configs.to_yaml(configs.load(None, overrides or ())), end="")


def show_report(report: bench.Report | None, **_: Any) -> None:
    """Print what a benchmark returned."""
    if report is None:  # only help was asked for
        return
    for table in report.tables:
        print_table(table.title, table.header, table.rows)
    for note in report.notes:
        print(note)
    if report.as_json:
        print(json.dumps(report.numbers))


app.add_typer(bench.app, name="bench", result_callback=show_report)


def main() -> None:
    """The console script: 0 done, 2 something the user can mend, 130 interrupted."""
    debug = "--debug" in sys.argv
    if len(sys.argv) == 1:  # not an error
        sys.argv.append("--help")
    try:
        app(standalone_mode=False)
    except Failure as failure:
        if debug:
            raise
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        shown = getattr(error, "format_message", None)
        text = shown() if shown else f"{type(error).__name__}: {error} (--debug before the command shows where)"
        print(f"error: {text}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
