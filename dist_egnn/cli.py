"""The command line: `distegnn …`. What it does is in the modules; this parses, prints and turns failures into one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .commands.runs import (
    make_store,
    resume_training,
    run_doctor,
    run_evaluation,
    run_import,
    run_plan,
    run_training,
    run_verification,
)
from .errors import Failure
from .utils.console import example, print_table

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


@app.command(
    epilog=example(
        "distegnn partition recipes/fluid113k/sample.h5 --config recipes/fluid113k/config.yaml --parts 2 --out store"
    )
)
def partition(
    data: Annotated[Path, typer.Argument(help="trajectories.h5, as a recipe's prepare.py writes it")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="folder of the store (needed unless --compare)")] = None,
    parts: Annotated[int, typer.Option(help="parts of each graph: one process each in training")] = 2,
    trainers: Annotated[
        int,
        typer.Option(help="cut each part once more, into as many: then a part is a machine, a piece a process on it"),
    ] = 1,
    weights: Annotated[
        str | None,
        typer.Option(help="what each process is to own of a graph, one number for each, comma-separated: 2,1,1"),
    ] = None,
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
    periodic: Annotated[
        bool, typer.Option("--periodic", help="edges also across the boundary of a trajectory's periodic box")
    ] = False,
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
        "periodic": "true" if periodic else None,
        "frames": frames,
        "last_frame": last_frame,
    }
    if config is None and radius is None:
        raise Failure("--radius is missing: name it (inf joins every pair of nodes), or give a --config")
    given = [f"data.{k}={v}" for k, v in options.items() if v is not None]
    settings = configs.load(config, [*given, *(overrides or ())]).data
    try:
        wanted = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError as error:
        raise Failure(f"--weights {weights}: write one number a process, comma-separated, as 2,1,1") from error
    from .data.trajectories import Trajectories
    from .partition import store_writer

    file = Trajectories(data)
    inputs = store_writer.inputs_of(
        file,
        parts=parts,
        trainers=trainers,
        weights=wanted,
        method=method,
        method_seed=seed,
        settings=settings,
        shard_nodes=store_writer.SHARD_NODES if shard_nodes is None else shard_nodes,
    )
    if compare:
        rows = store_writer.compare(file, inputs)
        print_table(
            f"first snapshot of {data}, {inputs.processes} parts",
            ["method", "edges cut", "largest/mean", "halo/nodes", "seconds"],
            [[name, f"{q.edge_cut:.1%}", f"{q.balance:.3f}", f"{q.halo_share:.1%}", f"{s:.2f}"] for name, q, s in rows],
        )
        return
    if out is None:
        raise Failure("--out is missing: name the folder of the store, for example --out store")
    make_store(file, out, inputs)


@app.command(epilog=example("distegnn verify store --model recipes/fluid113k/config.yaml"))
def verify(
    store: Annotated[Path, typer.Argument(help="folder of a store")],
    model: Annotated[
        Path | None, typer.Option(help="config whose model is run on P processes and on one, and compared in float64")
    ] = None,
    overrides: Overrides = None,
    snapshot: Annotated[
        int | None, typer.Option(help="snapshot that the model is compared on", show_default="the middle one")
    ] = None,
    halo: Annotated[
        str | None,
        typer.Option(
            help="bridge: against one process on the cut graph; exchange: on the full graph",
            show_default="partition.halo",
        ),
    ] = None,
) -> None:
    """Re-check a store: hashes, every node and edge exactly once; with --model, that P processes equal one."""
    from . import config as configs

    overrides = [*(overrides or ()), *([] if halo is None else [f"partition.halo={halo}"])]
    if model is None and (overrides or snapshot is not None):
        raise Failure(
            "--snapshot, --halo and config keys are for the comparison of a model: name its config with --model"
        )
    run_verification(store, configs.load(model, overrides) if model else None, snapshot)


@app.command(epilog=example("distegnn doctor --json"))
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="the findings again, as JSON on the last line")] = False,
) -> None:
    """Check installation and machine: versions, DGL, threads, memory, network, GPU. Exit code 1 if there is a problem."""
    if not run_doctor(as_json):
        sys.exit(1)


@app.command(epilog=example("distegnn plan recipes/fluid113k/config.yaml partition.parts=2"))
def plan(
    config: Annotated[Path, typer.Argument(help="the config that `distegnn train` will be given")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="the numbers again, as JSON on the last line")] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="also the speed of every process's device, and weights of the parts from it"),
    ] = False,
) -> None:
    """Say what a training run will take: graphs, memory, sums and time of every process, from a few real steps of each."""
    from . import config as configs

    run_plan(configs.load(config, overrides or ()), as_json, measure)


@app.command(
    epilog=example("distegnn train recipes/fluid113k/config.yaml data.path=store train.epochs=10 run.dir=runs/fluid")
)
def train(
    config: Annotated[
        str | None,
        typer.Argument(help="a recipe's config.yaml; `distegnn config` prints every key", show_default=False),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="go on with the run in this folder, under its own config")
    ] = None,
) -> None:
    """Train a model; several parts mean several processes, one per part.

    A run that was killed or stopped goes on with distegnn train --resume RUN, more epochs with train.epochs=N behind it.
    SIGTERM and Ctrl-C write a checkpoint first: exit code 75.
    """
    from . import config as configs

    words = [*([config] if config is not None else []), *(overrides or ())]
    if resume is not None:
        if words and "=" not in words[0]:
            raise Failure(f"{words[0]}: --resume {resume} goes on under the run's own config; leave this one out")
        resume_training(resume, words)
    elif config is None:
        raise Failure("the config is missing: distegnn train CONFIG, or distegnn train --resume RUN")
    else:
        run_training(configs.load(config, overrides or ()))


@app.command(
    epilog=example(
        "distegnn launch recipes/fluid113k/config.yaml data.path=served run.dir=runs/served --local --dry-run"
    )
)
def launch(
    config: Annotated[str | None, typer.Argument(help="as for `distegnn train`", show_default=False)] = None,
    overrides: Overrides = None,
    hosts: Annotated[
        Path | None,
        typer.Option(help="file: a host a line, as [user@]host [port=22] [trainers=2] [interface=eth0] [python=/path]"),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="this machine alone, over its loopback")] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="go on with the run in this folder, under its own config")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check every host, print the plan, start nothing")] = False,
    dispatch: Annotated[
        bool, typer.Option("--dispatch", help="first copy each host its part of the store, by rsync over ssh")
    ] = False,
    max_restarts: Annotated[int, typer.Option(min=0, help="starts from the last checkpoint after a failure")] = 3,
    port: Annotated[
        int, typer.Option(min=0, max=65000, help="the servers' port, the next ones for the rendezvous; 0: free ones")
    ] = 0,
    ssh: Annotated[
        str | None, typer.Option(help="program that runs a command on a host", show_default="ssh, keys only")
    ] = None,
) -> None:
    """Train on several machines: DistDGL's servers hold the store, trainers everywhere; restarted when something dies.

    The store is one made with --parts MACHINES --trainers N --shard-nodes 0, at the same path on every host; the run's folder is
    the first host's. Without --hosts and --local, the hosts are those of the Slurm job. docs/distributed.md goes through it.
    """
    from . import config as configs
    from .commands.runs import resumed_config
    from .launch import hostfile
    from .launch import main as launch_main

    if local and hosts:
        raise Failure(f"--local and --hosts {hosts}: take one of them")
    listed = hostfile.listed(hosts, local, ssh)
    words = [*([config] if config is not None else []), *(overrides or ())]
    if resume is not None:
        settings = resumed_config(resume, words)
    elif config is None:
        raise Failure(
            "the config is missing: distegnn launch CONFIG --hosts FILE, or distegnn launch --resume RUN --hosts FILE"
        )
    else:
        settings = configs.load(config, overrides or ())
    launch_main.run(
        settings,
        listed,
        resume=resume is not None,
        port=port,
        max_restarts=max_restarts,
        dry_run=dry_run,
        dispatch=dispatch,
    )


@app.command(epilog=example("distegnn evaluate runs/fluid"))
def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    split: Annotated[str, typer.Option(help="train, valid or test")] = "test",
) -> None:
    """The best checkpoint's error on every test sample, beside the static and the linear prediction."""
    found = run_evaluation(run, split)
    rows = [[name, f"{value:.4e}", f"{value / found['linear']:.3f}"] for name, value in found.items()]
    print_table(f"{run}: mean squared error, split {split}", ["prediction", "MSE", "of linear"], rows)


@app.command(
    epilog=example(
        "distegnn rollout runs/fluid --data recipes/fluid113k/sample.h5 --trajectory 5 --steps 10 --out runs/fluid/rollout.vtkhdf"
    )
)
def rollout(
    run: Annotated[Path, typer.Argument(help="folder of a run; its best checkpoint is used")],
    trajectory: Annotated[int, typer.Option(help="number of the trajectory in the data, from 0")],
    steps: Annotated[int, typer.Option(help="steps of data.horizon frames each")],
    out: Annotated[Path, typer.Option(help="file to write, .vtkhdf; its errors by step go to the .csv beside it")],
    start: Annotated[int | None, typer.Option(help="first frame", show_default="data.first_frame of the run")] = None,
    data: Annotated[
        Path | None, typer.Option(help="trajectories.h5, if the run was trained on a store, or another file")
    ] = None,
    parts: Annotated[int | None, typer.Option(help="processes", show_default="as in training")] = None,
    repartition: Annotated[int, typer.Option(help="steps from one partition to the next, with several processes")] = 1,
    bounds: Annotated[
        str, typer.Option(help="at the walls of the data's box: none, reflect, or clamp (stop at the wall)")
    ] = "none",
    fixed: Annotated[
        str | None, typer.Option(help="nodes that stay where they are, as ATTRIBUTE=VALUE, for example type=3")
    ] = None,
) -> None:
    """Feed a model with its own predictions, step after step; a file for ParaView, a table of errors."""
    from .evaluate.rollout import run_rollout

    run_rollout(
        run,
        trajectory=trajectory,
        steps=steps,
        out=out,
        start=start,
        data=data,
        parts=parts,
        repartition=repartition,
        bounds=bounds,
        fixed=fixed,
    )


@app.command(epilog=example("distegnn report runs/fluid --rollout runs/fluid/rollout.vtkhdf"))
def report(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    rollout: Annotated[
        Path | None,
        typer.Option(help="file that `distegnn rollout` wrote", show_default="the newest .vtkhdf in the run's folder"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="page to write, .html; an older one is replaced", show_default="RUN/report.html")
    ] = None,
) -> None:
    """Show a run on one page: curves, errors, a sample, a rollout, seconds by phase, settings. The file needs no other."""
    from .viz.html_report import run_report

    run_report(run, rollout, out)


@app.command(epilog=example("distegnn render runs/fluid/rollout.vtkhdf --out runs/fluid/rollout.gif --fps 4"))
def render(
    rollout: Annotated[Path, typer.Argument(help="file that `distegnn rollout` wrote")],
    out: Annotated[
        Path | None,
        typer.Option(help="a new .mp4 (needs ffmpeg), .gif, or folder of PNG", show_default="ROLLOUT with .mp4"),
    ] = None,
    fps: Annotated[float, typer.Option(help="pictures a second")] = 5.0,
    every: Annotated[int, typer.Option(help="draw every n-th frame")] = 1,
    colour: Annotated[
        str, typer.Option(help="colour nodes by speed, error (where the truth is known) or part")
    ] = "speed",
) -> None:
    """Draw a rollout as a film, the predicted nodes beside the true ones where the data have them."""
    from .viz.render import run_render

    run_render(rollout, out, fps, every, colour)


@app.command(
    "import-checkpoint",
    epilog=example("distegnn import-checkpoint best.pth --config recipes/fluid113k/config.yaml --out runs/published"),
)
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help=".pt or .pth file with a FastEGNN state dict of the authors' code")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run to make (needed)")] = None,
    config: Annotated[
        Path | None, typer.Option(help="config of the data that the weights were trained on; options below win")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="the weights were trained with normalize")] = False,
    gravity: Annotated[
        str | None, typer.Option(help="the constant vector they were trained with, as 0,-9.81,0")
    ] = None,
    radius: Annotated[
        float | None, typer.Option(help="edges join nodes up to this distance (inf: complete graph)")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="input features in the weights' order, comma-separated: attributes, speed, NAME/max"),
    ] = None,
    horizon: Annotated[int | None, typer.Option(help="frames from input to target")] = None,
) -> None:
    """Make a run of published FastEGNN weights, for evaluation and for `dist_egnn.load`. No code in FILE is run."""
    from . import config as configs

    if out is None:
        raise Failure("--out is missing: name the folder of the run to make, for example --out runs/published")
    if config is None and radius is None:
        raise Failure("--radius is missing: name it (inf joins every pair of nodes), or give a --config")
    options = {
        "model.normalize": True if normalize else None,
        "model.gravity": f"[{gravity}]" if gravity is not None else None,
        "data.radius": radius,
        "data.features": f"[{features}]" if features is not None else None,
        "data.horizon": horizon,
        "run.dir": out,
    }
    given = [f"{k}={v}" for k, v in options.items() if v is not None]
    run_import(file, configs.load(config, [*given, *(overrides or ())]))


@app.command(epilog=example("distegnn sweep recipes/nbody/sweep.yaml --jobs 2 --minutes 60"))
def sweep(
    file: Annotated[Path, typer.Argument(help="the sweep, as above")],
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time, each with one thread a process")] = 1,
    minutes: Annotated[float | None, typer.Option(min=0, help="begin no run after so many minutes")] = None,
    table: Annotated[bool, typer.Option("--table", help="run nothing: table and picture of what is finished")] = False,
) -> None:
    """Train and evaluate a grid of settings and seeds; one table, one picture.

    A file names a config, what all runs share, grids of what varies, and seeds:

    \b
      config: recipes/nbody/config.yaml
      out: runs/nbody
      set: {train.epochs: 20}
      grids:
        - keys: {model.name: [EGNN, FastEGNN], data.edge_drop: [0, 0.5, 1]}
        - keys: {model.name: [FastEGNN]}
          partition: {parts: 4, method: metis}
      seeds: [0, 1, 2]
      baseline: {model.name: EGNN}
      plot: {x: data.edge_drop, lines: [model.name, partition.parts]}

    The same command goes on after a kill and never repeats a finished run. Results: results.csv (a row a setting), runs.csv
    (a row a run) and plot.png in the folder out. Exit code 1 if a run failed.
    """
    import math

    from .commands import sweep as sweeps
    from .commands import sweep_config
    from .partition import assign
    from .utils import part_weights

    plan = sweep_config.load(file)
    failed: dict[str, str] = {}
    if not table:
        sweep_config.check(plan)
        for run in plan.runs:
            cut = run.config.partition
            assign.check(cut.method, 1, cut.weights and part_weights.of(cut.weights, len(cut.weights)))
        failed = sweeps.execute(plan, jobs, math.inf if minutes is None else minutes)
    sweeps.show(plan, sweeps.table(plan), failed)
    if failed:
        sys.exit(1)


@app.command("config", epilog=example("distegnn config train.epochs=10 > my.yaml"))
def show_config(overrides: Overrides = None) -> None:
    """Print every config key with its default and what it means."""
    from . import config as configs

    print(configs.to_yaml(configs.load(None, overrides or ())), end="")


def console(commands: typer.Typer = app) -> None:
    """`main` without malloc's cache of small blocks, else METIS's answer is not always the same: partition/assign.py.

    glibc reads this setting only when a process starts: the process starts itself once more. Training is as fast without.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "tcache_count" not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.tcache_count=0"]))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    main(commands)


def main(commands: typer.Typer = app) -> None:
    """The command line: 0 done, 2 something the user can mend, 75 stopped and can go on, 130 interrupted."""
    debug = "--debug" in sys.argv
    if len(sys.argv) == 1:  # not an error
        sys.argv.append("--help")
    try:
        if commands(standalone_mode=False) == 130:  # typer makes this of Ctrl-C
            raise KeyboardInterrupt
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
    console()
