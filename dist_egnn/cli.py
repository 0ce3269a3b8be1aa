"""The command line `distegnn`: parses arguments, calls `dist_egnn.commands`, and prints a failure as one line."""

from __future__ import annotations

import atexit
import gc
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option, Typer

from . import __version__
from . import config as configs
from .errors import Failure
from .utils.console import check_output, example, guard_streams

# one thread per process unless the user sets another number: DGL's kernels slow down when threads outnumber cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

app = Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
METHODS = "metis, random, kmeans, spectral (of 2,000 nodes), bisection (by coordinates) or morton (Z-order curve)"
LIMIT = "stop when neighbours, spacing or kinetic energy change by this factor; 0: never"
TRAJECTORY, FIRST_FRAME = "number from 0, all, train, valid or test", "data.first_frame of the run"
FORMATS = "arrays, lagrangebench, vtk, lammps, ase, mdanalysis or table"
PARTITIONING = {"partition", "plan", "train", "launch", "evaluate", "rollout", "sweep"}  # commands that may call METIS
HOST_LINE = "[user@]host [port=22] [trainers=2] [interface=eth0] [python=/path]"

Overrides = Annotated[list[str] | None, Argument(help="config keys to set, as key=value", show_default=False)]
TrainConfig = Annotated[str | None, Argument(help="a config file; needed without --resume", show_default=False)]
DataConfig = Annotated[Path | None, Option(help="config with the data section; --radius and KEY=VALUE win over it")]
Radius = Annotated[float | None, Option(help="data.radius: edges join nodes up to this distance (inf: all nodes)")]
Resume = Annotated[Path | None, Option(metavar="RUN", help="continue the run in this folder with its own config")]
Run = Annotated[Path, Argument(help="folder of a run")]
Json = Annotated[bool, Option("--json", help="print the results again, as JSON on the last line")]


def command(words: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a subcommand whose help ends with this example; its first word is the name of the subcommand."""
    return app.command(words.split()[0], epilog=example(f"distegnn {words}"))


def print_version(given: bool) -> None:
    if given:
        print(f"distegnn {__version__}")
        raise Exit


@app.callback()
def main_options(
    debug: Annotated[bool, Option("--debug", help="show the traceback of a failure")] = False,
    version: Annotated[
        bool, Option("--version", callback=print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Train equivariant graph networks on geometric graphs too large for one device."""


def data_config(
    config: Path | None, radius: float | None, overrides: list[str] | None, published: bool = False
) -> configs.Config:
    """The config of a command that needs a data section: --config, then --radius and the overrides. Raises Failure."""
    words = [*([] if radius is None else [f"data.radius={radius}"]), *(overrides or ())]
    if config is None and not any(word.startswith(("data.radius=", "data.edges=")) for word in words):
        raise Failure(
            "--radius is missing: set it (inf joins every pair of nodes), or data.edges, or name a config with --config"
        )
    return configs.load(config, words, published=published)


@command("import frames.npz --out mine.h5 --dt 0.01 --fixed 1")
def import_data(
    sources: Annotated[list[Path], Argument(help="files or a folder; several files may be the frames of a series")],
    out: Annotated[Path, Option(help="the trajectories.h5 to write")],
    format: Annotated[str | None, Option(help=FORMATS, show_default="by the content")] = None,
    split: Annotated[
        str, Option(help="shares of training, validation, test: of trajectories, or in time of one")
    ] = "0.8,0.1,0.1",
    stride: Annotated[int, Option(min=1, help="keep the frames 0, STRIDE, 2 STRIDE, …")] = 1,
    dt: Annotated[float | None, Option(help="time between frames", show_default="as the source says")] = None,
    scale: Annotated[float, Option(help="factor of all lengths, such as 0.001 from mm to m")] = 1.0,
    attributes: Annotated[
        str | None, Option(help="fields to keep as node attributes: mass,charge", show_default="all")
    ] = None,
    select: Annotated[str | None, Option(help="atoms, in MDAnalysis's language: 'protein and backbone'")] = None,
    ids: Annotated[
        str | None, Option(metavar="FIELD", help="field that identifies a particle", show_default="id, …")
    ] = None,
    type: Annotated[
        str | None, Option(metavar="FIELD", help="field with the type of a particle", show_default="type, …")
    ] = None,
    fixed: Annotated[str | None, Option(help="types that never move, as 1,3: sets the attribute `fixed`")] = None,
    periodic: Annotated[
        bool | None, Option(help="the box is periodic; unwraps positions", show_default="as the source says")
    ] = None,
    box: Annotated[str | None, Option(help="low and high corner as x,y,z,x,y,z", show_default="of the source")] = None,
    repeat: Annotated[str | None, Option(metavar="A,B,C", help="copies of the periodic box along x, y and z")] = None,
    rescale: Annotated[bool, Option("--rescale", help="scale each frame to the periodic box of the first")] = False,
    center: Annotated[bool, Option("--center", help="move the mean of the first frame to the origin")] = False,
) -> None:
    """Convert trajectories of other programs into a trajectories.h5, with checks.

    Reads every source twice, one frame at a time: first to check and measure, then to write. A second call continues an
    interrupted one.
    """
    if out.exists() and out in sources:
        raise Failure(f"--out {out}: is one of the sources; choose another file")
    from .commands.import_data import parse_options, run_import

    texts = {"split": split, "attributes": attributes, "fixed": fixed, "box": box, "repeat": repeat}
    run_import(
        sources,
        out,
        parse_options(
            texts,
            format=format,
            stride=stride,
            dt=dt,
            scale=scale,
            select=select,
            ids=ids,
            type=type,
            periodic=periodic,
            rescale=rescale,
            center=center,
        ),
    )


@command("inspect recipes/fluid113k/sample.h5 --suggest my.yaml --out inspection.html")
def inspect(
    file: Annotated[Path, Argument(help="trajectories.h5, store or run")],
    out: Annotated[Path | None, Option(help=".html file to write or replace: tables and pictures")] = None,
    suggest: Annotated[Path | None, Option(help="config to write for FILE, each key with its reason")] = None,
) -> None:
    """Print what a file, a store or a run holds.

    Of a trajectories.h5: motion, spacing and fields, neighbours by radius, and errors of predictions without a model, all
    measured on a sample of trajectories and frames. --suggest writes a config that `distegnn train` accepts.
    """
    from .commands.inspect_data import run_inspection

    run_inspection(file, out, suggest)


@command("partition recipes/fluid113k/sample.h5 --config recipes/fluid113k/config.yaml --parts 2 --out store")
def partition(
    data: Annotated[Path, Argument(help="trajectories.h5, as a recipe's prepare.py writes it")],
    overrides: Overrides = None,
    out: Annotated[Path | None, Option(help="folder of the store (needed unless --compare)")] = None,
    parts: Annotated[int, Option(help="parts of each graph; training runs one process per part")] = 2,
    trainers: Annotated[int, Option(help="pieces of each part: one part per machine, one piece per process on it")] = 1,
    weights: Annotated[str | None, Option(help="share of the nodes for each process, in any unit: 2,1,1")] = None,
    method: Annotated[str, Option(help=METHODS)] = "metis",
    config: DataConfig = None,
    radius: Radius = None,
    seed: Annotated[int, Option(help="seed of random, kmeans and spectral")] = 0,
    shard_nodes: Annotated[int | None, Option(help="nodes per DistDGL graph (262,144); 0: one, for `launch`")] = None,
    compare: Annotated[bool, Option("--compare", help="only compare all methods on the first snapshot")] = False,
) -> None:
    """Partition every snapshot and write a store. --config and overrides (data.horizon=10) set the data section."""
    for word in overrides or ():
        if "=" in word and not word.startswith("data."):
            raise Failure(f"override '{word}': only data.* keys can be set here; the partition has options: --parts …")
    settings = data_config(config, radius, overrides)
    try:
        shares = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError as error:
        raise Failure(f"--weights {weights}: write one number per process, comma-separated, as 2,1,1") from error
    settings.data.path, settings.partition = str(data), configs.Partition(parts, method, seed, shares)
    from .commands.partition import run_comparison, store_inputs, write_store

    file, inputs = store_inputs(settings, trainers, shard_nodes)
    if compare:
        run_comparison(data, file, inputs)
    elif out is None:
        raise Failure("--out is missing: name the folder of the store, for example --out store")
    else:
        write_store(file, inputs, out)


@command("verify store --model recipes/fluid113k/config.yaml")
def verify(
    store: Annotated[Path, Argument(help="folder of a store")],
    model: Annotated[Path | None, Option(help="config of a model to compare on P processes and on one")] = None,
    overrides: Overrides = None,
    snapshot: Annotated[int | None, Option(help="snapshot to compare on", show_default="the middle one")] = None,
    halo: Annotated[str | None, Option(help="partition.halo; bridge: compare on the cut graph, exchange: full")] = None,
) -> None:
    """Check that a store is whole and correct.

    Checks the hashes, and that it holds every node and edge exactly once. With --model, also compares predictions and
    gradients of the model on P processes with those on one process, in float64.
    """
    overrides = [*(overrides or ()), *([] if halo is None else [f"partition.halo={halo}"])]
    if model is None and (overrides or snapshot is not None):
        raise Failure("--snapshot, --halo and config keys need a model to compare: name its config with --model")
    from .commands.verify import run_verification

    run_verification(store, configs.load(model, overrides) if model else None, snapshot)


@command("doctor --json")
def doctor(as_json: Json = False) -> None:
    """Check the installation and this machine. Covers versions, DGL, threads, memory, network, GPU; exit code 1: problem."""
    from .commands.doctor import run_doctor

    if not run_doctor(as_json):
        sys.exit(1)


@command("plan recipes/fluid113k/config.yaml partition.parts=2")
def plan(
    config: Annotated[Path, Argument(help="the config that `distegnn train` will be given")],
    overrides: Overrides = None,
    as_json: Json = False,
    measure: Annotated[bool, Option("--measure", help="also measure devices and propose partition.weights")] = False,
) -> None:
    """Estimate memory, communication and time. Runs a few real steps of every process of a training run."""
    print(f"{config}: loading torch and DGL", file=sys.stderr, flush=True)  # which takes seconds
    from .commands.plan import run_plan

    run_plan(configs.load(config, overrides or ()), as_json, measure)


def training_config(name: str, config: str | None, overrides: list[str] | None, resume: Path | None) -> configs.Config:
    """The config of a new run, or of the run to resume. Raises Failure if both or neither are named."""
    if resume is None and config is None:
        raise Failure(f"the config is missing: distegnn {name} CONFIG, or distegnn {name} --resume RUN")
    if resume is None:
        return configs.load(config, overrides or ())
    if config is not None and "=" not in config:
        raise Failure(f"{config}: --resume {resume} uses the config of that run; leave this one out")
    from .commands.train import resumed_config

    return resumed_config(resume, [*([] if config is None else [config]), *(overrides or ())])


@command("train recipes/fluid113k/config.yaml data.path=store train.epochs=10 run.dir=runs/fluid")
def train(config: TrainConfig = None, overrides: Overrides = None, resume: Resume = None) -> None:
    """Train a model, or resume a run.

    Training runs one process per part of the graph. SIGTERM, SIGHUP and Ctrl-C write a checkpoint before the exit, with
    code 75. `distegnn train --resume RUN` continues a run that was killed or stopped; train.epochs=N sets a larger total.
    """
    from .commands.train import run_training

    run_training(training_config("train", config, overrides, resume), resume is not None)


@command("launch recipes/fluid113k/config.yaml data.path=served run.dir=runs/served --local --dry-run")
def launch(
    config: TrainConfig = None,
    overrides: Overrides = None,
    hosts: Annotated[Path | None, Option(help=f"file, one host per line: {HOST_LINE}")] = None,
    local: Annotated[bool, Option("--local", help="only this machine, over its loopback interface")] = False,
    resume: Resume = None,
    plan: Annotated[bool, Option("--plan", help="print which host would run what; reach no host")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="check every host and print the plan; start nothing")] = False,
    dispatch: Annotated[bool, Option("--dispatch", help="first copy the store to the hosts by rsync")] = False,
    max_restarts: Annotated[int, Option(min=0, help="restarts from the last checkpoint after failures")] = 3,
    port: Annotated[int, Option(min=0, max=65000, help="port of servers; next ones: rendezvous; 0: free ports")] = 0,
    ssh: Annotated[str | None, Option(help="program that reaches a host", show_default="ssh, keys only")] = None,
) -> None:
    """Train a model on several machines.

    DistDGL servers hold the store, trainers run on every host; after a failure they restart from the last checkpoint.
    Make the store with --parts MACHINES --trainers N --shard-nodes 0. It has the same path on every host; run.dir is on
    the first. Without --hosts and --local, the hosts are those of the Slurm job. See docs/distributed.md.
    """
    from .launch import hostfile
    from .launch import main as launch_main

    if local and hosts:
        raise Failure(f"--local and --hosts {hosts}: use one of them")
    settings, targets = training_config("launch", config, overrides, resume), hostfile.select_hosts(hosts, local, ssh)
    launch_main.run(
        settings,
        targets,
        resume=bool(resume),
        port=port,
        max_restarts=max_restarts,
        plan=plan,
        dry_run=dry_run,
        dispatch=dispatch,
    )


@command("evaluate runs/fluid")
def evaluate(
    run: Run,
    split: Annotated[str, Option(help="train, valid or test")] = "test",
    data: Annotated[Path | None, Option(help="trajectories.h5 or store", show_default="the run's data")] = None,
    rollout: Annotated[int | None, Option(min=1, help="steps of rollouts to evaluate, in place of one step")] = None,
    start: Annotated[int | None, Option(help="first frame of the rollouts", show_default=FIRST_FRAME)] = None,
    trajectory: Annotated[str | None, Option(help=TRAJECTORY, show_default="those of the split")] = None,
    parts: Annotated[int | None, Option(help="processes of the rollouts", show_default="as in training")] = None,
) -> None:
    """Print the error of a run's best checkpoint. Baselines: static (x), linear (x + t·v, t fitted on split train).

    With --rollout: errors by step of rollouts, their kinetic energy and Sinkhorn distance, the share of nodes outside
    the box; baselines: static, linear (x + t·v, not fitted), ballistic (free flight that ends at the walls).
    """
    from .commands import evaluate as evaluation

    options: dict[str, Any] = {"start": start, "trajectory": trajectory, "parts": parts}
    if rollout is not None:
        return evaluation.print_rollouts(run, rollout, split, data=data, **options)
    if given := [f"--{name}" for name, value in options.items() if value is not None]:
        raise Failure(f"{given[0]}: is an option of rollouts; add --rollout STEPS")
    evaluation.print_evaluation(run, split, data)


@command(
    "rollout runs/fluid --data recipes/fluid113k/sample.h5 --trajectory 5 --steps 10 --out runs/fluid/rollout.vtkhdf"
)
def rollout(
    run: Run,
    trajectory: Annotated[str, Option(help=TRAJECTORY)],
    steps: Annotated[int, Option(help="number of steps, of data.horizon frames each")],
    out: Annotated[Path, Option(help=".vtkhdf file to write, errors by step beside it (.csv); of several: a folder")],
    start: Annotated[int | None, Option(help="first frame", show_default=FIRST_FRAME)] = None,
    data: Annotated[Path | None, Option(help="trajectories.h5; needed for a run that was trained on a store")] = None,
    parts: Annotated[int | None, Option(help="number of processes", show_default="as in training")] = None,
    repartition: Annotated[
        int | None,
        Option(help="steps between partitions, with several processes", show_default="1; simulator in halo mode: 10"),
    ] = None,
    bounds: Annotated[str, Option(help="at the walls of the data's box: none, reflect, or clamp")] = "none",
    fixed: Annotated[str | None, Option(help="nodes that do not move", show_default="data.fixed of the run")] = None,
    limit: Annotated[float, Option(min=0, help=LIMIT)] = 30.0,
) -> None:
    """Feed a model with its own predictions. Writes the trajectory for ParaView, and a table of errors by step."""
    from .evaluate.rollout import run_rollouts

    options = {"parts": parts, "repartition": repartition, "bounds": bounds, "fixed": fixed, "limit": limit}
    run_rollouts(run, data=data, trajectory=trajectory, start=start, steps=steps, out=out, **options)


@command("report runs/fluid --rollout runs/fluid/rollout.vtkhdf")
def report(
    run: Run,
    rollout: Annotated[Path | None, Option(help="a rollout's .vtkhdf", show_default="the newest in RUN")] = None,
    out: Annotated[Path | None, Option(help=".html file to write or replace", show_default="RUN/report.html")] = None,
) -> None:
    """Write an HTML report of a run. One file: curves, errors, a sample, a rollout, time by phase, settings."""
    from .viz.html_report import run_report

    run_report(run, rollout, out)


@command("render runs/fluid/rollout.vtkhdf --out runs/fluid/rollout.gif --fps 4")
def render(
    rollout: Annotated[Path, Argument(help="file that `distegnn rollout` wrote")],
    out: Annotated[
        Path | None, Option(help=".mp4 (needs ffmpeg), .gif, folder of PNG, or .png: one picture; else ROLLOUT.mp4")
    ] = None,
    fps: Annotated[float, Option(help="frames per second")] = 5.0,
    every: Annotated[int, Option(help="draw every n-th frame")] = 1,
    colour: Annotated[str, Option(help="colour of the nodes: speed, error (with ground truth) or part")] = "speed",
    steps: Annotated[str, Option(help="steps in one picture (.png), as 5,15,25,40", show_default="four")] = "",
    title: Annotated[str, Option(help="of one picture (.png)", show_default="name of the file")] = "",
    units: Annotated[
        str, Option(help="of length, time, energy in one picture (.png), as m,s,J", show_default="none")
    ] = "",
) -> None:
    """Render a rollout as a video, or as one picture of a few steps with the energy and the error over time.

    Draws the predicted nodes beside the true ones, where the data contain them.
    """
    if out and out.suffix == ".png":
        from .viz.rollout_figure import run_figure

        return run_figure(rollout, out, steps, title, units)
    for name, value in (("--steps", steps), ("--title", title), ("--units", units)):
        if value:
            raise Failure(f"{name}: is for one picture; use --out PICTURE.png")
    from .viz.render import run_render

    run_render(rollout, out, fps, every, colour)


@command("export runs/fluid --out fluid.pt2")
def export(
    run: Annotated[Path, Argument(help="folder of a run, or a checkpoint")],
    out: Annotated[Path, Option(help=".pt2 file to write or replace")],
) -> None:
    """Write the model as a torch.export package, which predicts without dist_egnn and DGL. See docs/inference.md."""
    from .commands.export import run_export

    run_export(run, out)


@command("import-checkpoint best_model.pth --out runs/published")
def import_checkpoint(
    file: Annotated[Path, Argument(help="best_model.pth, or another file with a FastEGNN of the authors' code")],
    out: Annotated[Path, Option(help="folder of the run to make")],
    overrides: Overrides = None,
    config: DataConfig = None,
    radius: Radius = None,
) -> None:
    """Make a run of published FastEGNN weights. No code in FILE is executed.

    A file of DistEGNN's trainer contains the settings of its training, which take precedence over --config. For other
    files set them by overrides: data.horizon=10, data.features=[…] in the order of training, model.normalize=true,
    model.gravity=[0,-1,0].
    """
    from .commands.import_weights import published_settings, run_import
    from .models.published_weights import read_checkpoint

    state, trained_with = read_checkpoint(file)
    words = published_settings(trained_with, file)
    words += [*([] if radius is None else [f"data.radius={radius}"]), *(overrides or ())]
    settings = data_config(config, None, words, published=True)
    settings.run.dir = str(out)
    run_import(file, state, settings)


@command("sweep recipes/nbody/sweep.yaml --jobs 2 --minutes 60")
def sweep(
    file: Annotated[Path, Argument(help="the sweep file, as above")],
    jobs: Annotated[int, Option(min=1, help="runs at a time; their processes have one thread each")] = 1,
    minutes: Annotated[float | None, Option(min=0, help="start no run after this many minutes")] = None,
    table: Annotated[bool, Option("--table", help="start no run; write table and plot of finished runs")] = False,
) -> None:
    """Train a grid of settings and seeds.

    Every run is trained and evaluated. A sweep file names a config, what all runs share, what varies, and seeds:

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

    Repeat the command to continue an interrupted sweep; finished runs are not repeated. The folder `out` gets
    results.csv (a row per setting), runs.csv (a row per run) and plot.png. Exit code 1 if a run failed.
    """
    from .commands.sweep import run_sweep

    if not run_sweep(file, jobs, math.inf if minutes is None else minutes, table):
        sys.exit(1)


@command("config train.epochs=10 > my.yaml")
def config(overrides: Overrides = None) -> None:
    """Print every config key with its default."""
    print(configs.to_yaml(configs.load(None, overrides or ())), end="")
    check_output()


def console(commands: Callable[..., Any] = app) -> None:
    """Run `main`. What may partition runs without malloc's cache of small blocks, with which METIS's result varies.

    glibc reads this setting when a process starts: this process replaces itself once. Training is as fast without it.
    See partition/assign.py.
    """
    tunables, partitions = os.environ.get("GLIBC_TUNABLES", ""), commands is not app or PARTITIONING & {*sys.argv}
    if partitions and sys.platform == "linux" and "tcache_count" not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.tcache_count=0"]))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    atexit.register(gc.freeze)  # a last collection of all objects of torch and DGL would take a second
    main(commands)


def main(commands: Callable[..., Any] = app) -> None:
    """Exit codes: 0 done, 2 an error that the user can fix, 75 stopped with a checkpoint, 130 interrupted, 1 others."""
    guard_streams()
    # a shell replaces ~ only at the start of a word
    home = [
        re.sub(r"(?<==)~[^/]*", lambda user: os.path.expanduser(user[0]), w, count=1) if w[:2] == "--" else w
        for w in sys.argv
    ]
    sys.argv[:] = home
    if len(sys.argv) == 1:  # not an error
        sys.argv.append("--help")
    try:
        if commands(standalone_mode=False) == 130:  # what typer returns after Ctrl-C
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        code, text = 1, f"{type(error).__name__}: {error} (distegnn --debug COMMAND shows the traceback)"
        if isinstance(error, Failure):
            code, text = 2, str(error)
        elif format_message := getattr(error, "format_message", None):  # a usage error
            code, text = getattr(error, "exit_code", 2), format_message()
        print(f"error: {text}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    console()
