"""`distegnn rollout`: the file of a rollout, on one process or several, and the table of its errors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.nn import Module

from .. import config as configs
from ..data import checks, dataset, identity
from ..data.fixed_nodes import check_fixed, fixed_nodes, moving_nodes
from ..data.samples import count_columns, first_input
from ..data.store import open_store
from ..data.trajectories import SPLITS, Trajectories
from ..distributed import spawn
from ..distributed.comm import Comm
from ..errors import Failure
from ..ops import tiled_layer
from ..partition import assign
from ..train import checkpoint, preflight, run_dir, trainer
from ..utils import part_weights
from ..utils.console import print_table
from ..utils.filesystem import check_free_space, lock_output, write_atomically
from ..utils.laps import Laps
from ..utils.progress import progress_bar
from .boundary_conditions import BOUNDS, LIMIT, BoundaryConditions, RolloutJob
from .simulation import Simulation
from .step_errors import error_table
from .vtkhdf import RolloutWriter, file_bytes, finish, partial_path


def load_model(comm: Comm, job: RolloutJob) -> Module:
    """The model of a job with its weights, ready to predict."""
    data = Trajectories(job.data)
    widths = count_columns(data, job.spec.features), count_columns(data, job.spec.node_attributes)
    model = trainer.build_model(job.config, widths, comm)
    checkpoint.load_weights(model, checkpoint.load(Path(job.weights)), Path(job.weights))
    return (model.double() if job.double else model.to(trainer.join_device(comm, job.config))).eval()


def roll_out(comm: Comm, job: RolloutJob) -> tuple[str, Laps]:
    """Roll out on every process; rank 0 writes the frames.

    Returns why it stopped early, empty if it did not, and the seconds of its phases.
    """
    simulation = Simulation(comm, job, load_model(comm, job))
    shift = simulation.conditions.trajectory.shift
    with contextlib.ExitStack() as stack:
        stack.enter_context(tiled_layer.tile_threads(job.config.train.threads))
        tick = stack.enter_context(progress_bar("rolling out", job.steps, enabled=comm.rank == 0))
        for state in simulation:
            if comm.rank:
                continue
            if state.step == 0:
                writer = stack.enter_context(_writer(simulation.conditions, len(state.z)))
            y = simulation.true_position(state.frame)
            error = None if y is None else state.x.astype(np.float64) - y
            x, z = (state.x, state.z) if shift is None else (state.x + np.array(shift), state.z + np.array(shift))
            writer.add(x, state.v, state.part, error, z)
            if state.step:
                moving = ~simulation.conditions.fixed
                tick("" if error is None else f"MSE {np.square(error[moving]).mean():.3e}")
    return simulation.stopped, simulation.laps


def _writer(conditions: BoundaryConditions, virtual: int) -> RolloutWriter:
    job, trajectory = conditions.job, conditions.trajectory
    names = ("weights", "data", "trajectory", "start", "bounds", "repartition")
    meta = {name: getattr(job, name) for name in names}
    meta |= {"fixed": job.spec.fixed, "model": job.config.model.name, "horizon": job.spec.horizon, "dt": trajectory.dt}
    if conditions.around:
        meta["gravity"] = conditions.around[0].tolist()
    meta |= {"periodic": list(trajectory.axes), "true_frames": trajectory.frames, "velocity": conditions.velocity}
    size = job.steps + 1, trajectory.nodes, virtual
    box, dtype = conditions.box, conditions.dtype
    if trajectory.shift is not None:  # the file is in the source's coordinates, of which float32 would lose digits
        box, dtype = None if box is None else box + np.array(trajectory.shift), np.dtype(np.float64)
    return RolloutWriter(Path(job.out), size, meta, conditions.attributes, box, dtype)


def _warn_of_assumptions(file: Trajectories, k: int, start: int, horizon: int, fixed: str, simulator: bool) -> None:
    """Print what a rollout takes for granted although the data say otherwise."""
    where, item = f"warning: {file.path}: trajectory {k}", file[k]
    if "mass" in item.varying or item.widths.get("mass", 1) > 1:
        print(f"{where}: 'mass' varies or has several columns; energies are those of mass 1", file=sys.stderr)
    if fixed and not simulator and start + horizon < item.frames:
        x, y = file.position(k, start), file.position(k, start + horizon)
        moves = moving_nodes(fixed_nodes(fixed, partial(file.attribute, k)), x, y)
        if moves.any():
            text = f"node {moves.argmax()} moves in the data from frame {start}; the rollout keeps it where it is"
            print(f"{where}: {text} ('{fixed}' names fixed nodes)", file=sys.stderr)


def _check_new(out: Path) -> None:
    if existing := [path for path in (out, out.with_suffix(".csv")) if path.exists()]:
        raise Failure(f"{existing[0]}: exists; remove it or choose another --out")


def first_frame(data: configs.Data, file: Trajectories, k: int, start: int | None) -> int:
    """The frame that a rollout starts at; start: the one asked for. Raises Failure if it lacks the velocities of an input."""
    past = data.history * data.horizon
    earliest = past or first_input(file[k], data.velocity)
    start = max(data.first_frame, earliest) if start is None else start
    latest = file[k].frames - 1 - (not (past or file[k].velocity) and data.velocity == "forward")
    if not earliest <= start <= latest:
        possible = f"can start at frames {earliest} to {latest}"
        possible = possible if earliest <= latest else "is too short for data.history"
        raise Failure(f"--start {start}: trajectory {k} of {file.path} {possible}; choose another")
    return start


def open_trajectories(run: Path, config: configs.Config, data: Path | None) -> Trajectories:
    """The file at ``data``, or that of the run. Raises Failure for a run that was trained on a store, without ``data``."""
    path = config.data.path
    if data is None and not Path(path).is_file():
        store = open_store(path) if Path(path, "manifest.yaml").is_file() else None
        source = f", which was made from a file {store.inputs['source']}" if store else ""
        raise Failure(f"{run}: was trained on {path}{source}; name a trajectories.h5 with --data")
    return Trajectories(data or path)


def select_trajectories(file: Trajectories, text: str) -> list[int]:
    """The numbers that --trajectory names: one, all, or those of a split."""
    if text.removeprefix("-").isdecimal():
        if not 0 <= int(text) < len(file):
            raise Failure(f"--trajectory {text}: {file.path} has trajectories 0 to {len(file) - 1}")
        return [int(text)]
    if text not in ("all", *SPLITS):
        raise Failure(f"--trajectory {text}: use a number, all, {', '.join(SPLITS)}")
    chosen = [k for k, trajectory in enumerate(file) if text in ("all", trajectory.split)]
    if not chosen:
        raise Failure(f"--trajectory {text}: {file.path} has no trajectory in that split; use another")
    return chosen


def prepare_jobs(
    run: Path,
    *,
    trajectory: int | str,
    steps: int,
    out: Path | None,
    parts: int | None = None,
    data: Path | None = None,
    start: int | None = None,
    repartition: int | None = None,
    bounds: str = "none",
    fixed: str | None = None,
    limit: float = LIMIT,
) -> list[RolloutJob]:
    """The jobs of a run's best checkpoint on ``parts`` processes, or on as many as shared a graph in training.

    trajectory: see `select_trajectories`; out: a file, for several trajectories a folder, None: nothing is written.
    Raises Failure for options and data that do not fit, and where a step needs more memory than is free.
    """
    config = run_dir.load_config(run)
    trained = checkpoint.load(run / run_dir.BEST).get("data")
    try:
        trainer.resolve_device(config)
    except Failure as failure:  # no option sets the device: name the file that does
        raise Failure(f"{run / run_dir.CONFIG}: {failure}") from failure
    file = open_trajectories(run, config, data)
    chosen = select_trajectories(file, str(trajectory))
    if data is not None:
        checks.warn_of_content(file)
    if trained and data is None:
        checkpoint.compare_data(trained, identity.of_data(file.path), config.data, run)
    elif trained:
        identity.check_fits(trained, identity.describe(file, chosen), config.data, str(file.path), run)
    starts = [first_frame(config.data, file, k, start) for k in chosen]
    if repartition is None:
        # particles of a simulator hardly move in a step; in bridge mode a cut that stays costs accuracy
        repartition = 10 if config.data.history and config.partition.halo == "exchange" else 1
    if min(steps, repartition) < 1:
        raise Failure(f"--steps {steps}, --repartition {repartition}: both must be at least 1")
    if bounds not in BOUNDS:
        raise Failure(f"--bounds {bounds}: use one of {', '.join(BOUNDS)}")
    outputs = [""] * len(chosen) if out is None else [str(path.absolute()) for path in _outputs(out, chosen)]
    p = dataset.used_partition(config)
    processes = p.parts if parts is None else parts
    valid = part_weights.validate(p.weights, p.parts)
    weights = list(valid) if valid and processes == p.parts else None  # other numbers of processes have equal parts
    assign.check_method(p.method, processes, weights)
    config = replace(config, partition=replace(p, parts=processes, weights=weights))
    store = open_store(config.data.path) if Path(config.data.path, "manifest.yaml").is_file() else None
    null = store.inputs["features"] if store else [*file[0].attributes, "speed"]  # without the identity of the data
    features = identity.resolve_features(config.data, trained)
    spec = replace(dataset.sample_spec(config.data, null if features is None else features), pushforward=0)
    if fixed is not None:
        if not configs.FIXED[0](fixed):
            raise Failure(f"--fixed {fixed}: {configs.FIXED[1]}")
        spec = replace(spec, fixed=fixed)
    check_fixed(file, spec.fixed, "data.fixed=" if fixed is None else "--fixed ")
    if out is not None:
        check_free_space(Path(outputs[0]), sum(file_bytes(steps + 1, file[k].nodes) for k in chosen))
    given = steps, repartition, bounds
    jobs = []
    for k, first, output in zip(chosen, starts, outputs, strict=True):
        assign.check_size(file[k].nodes, processes, weights)
        preflight.check_rollout(config, file, k, first, processes, p.method)
        _warn_of_assumptions(file, k, first, config.data.horizon, spec.fixed, bool(spec.past))
        best, trajectories = (str(path.absolute()) for path in (run / run_dir.BEST, file.path))
        jobs.append(RolloutJob(config, best, trajectories, spec, k, first, *given, output, limit))
        BoundaryConditions(file, jobs[-1])  # raises before processes start
    file.close()
    return jobs


def prepare(run: Path, **options: Any) -> RolloutJob:
    """The job of one trajectory, as `prepare_jobs`."""
    return prepare_jobs(run, **options)[0]


def _outputs(out: Path, chosen: Sequence[int]) -> list[Path]:
    """The new files of these trajectories. Raises Failure if one exists, or for another suffix."""
    is_file = out.suffix in (".vtkhdf", ".hdf")
    if len(chosen) > 1 and is_file:
        raise Failure(f"--out {out}: {len(chosen)} trajectories need a folder; leave {out.suffix} out")
    if len(chosen) == 1 and not is_file:
        raise Failure(f"--out {out}: must end in .vtkhdf or .hdf, by which ParaView recognizes the format")
    paths = [out] if is_file else [out / f"trajectory-{k}.vtkhdf" for k in chosen]
    for path in paths:
        _check_new(path)
    return paths


def _has_free_walls(job: RolloutJob) -> bool:
    data = Trajectories(job.data)
    return job.bounds == "none" and data.box(job.trajectory) is not None and not data[job.trajectory].periodic


def run_rollouts(run: Path, *, out: Path, **options: Any) -> None:
    """Roll out every trajectory of `prepare_jobs`, as `run_rollout`. Raises Failure, after all, if one had to stop."""
    jobs, stopped = prepare_jobs(run, out=out, **options), 0
    for job in jobs:
        try:
            _write_rollout(job, out if len(jobs) == 1 else out / Path(job.out).name)
        except Failure as failure:
            if len(jobs) == 1:
                raise
            stopped += 1
            print(f"warning: {failure}", file=sys.stderr)
    if stopped:
        raise Failure(f"{out}: {stopped} of {len(jobs)} rollouts stopped early; the warnings say why")


def run_rollout(run: Path, *, out: Path, **options: Any) -> pd.DataFrame:
    """Roll out, write the table of errors beside the file, and print it. Raises Failure if the rollout had to stop.

    However it ends, unless this process is killed, --out contains all complete frames.
    """
    return _write_rollout(prepare(run, out=out, **options), out)


def _write_rollout(job: RolloutJob, shown: Path) -> pd.DataFrame:
    processes, timeout_s = job.config.partition.parts, job.config.train.timeout_s
    out = Path(job.out)
    with lock_output(out, "another rollout is writing it; wait for it, or choose another --out"):
        _check_new(shown)  # again, now that no other rollout can write it
        partial_path(out).unlink(missing_ok=True)  # of a killed rollout
        stopped = "an error or interruption"
        try:
            stopped, laps = spawn.run_ranks(roll_out, processes, job, timeout_s=timeout_s)[0]
        finally:
            frames = finish(out, stopped) if partial_path(out).is_file() else 0
            if 0 < frames < job.steps + 1:
                print(f"{shown}: {frames} of {job.steps + 1} frames")
        table = error_table(out)
        write_atomically(out.with_suffix(".csv"), table.to_csv(index=False).encode())
    selected = np.unique(np.linspace(min(1, frames - 1), frames - 1, 10).round().astype(int))  # to be printed
    header = {"mse": "MSE", "static_mse": "static", "linear_mse": "constant v"}
    header |= {"ballistic_mse": "ballistic"} if table["ballistic_mse"].notna().any() else {}
    header |= {"mae": "MAE"}
    header |= {"kinetic_energy": "energy", "true_kinetic_energy": "true"}
    numbers = table.iloc[selected][list(header)].map(lambda value: "" if np.isnan(value) else f"{value:.3e}")
    rows = table.iloc[selected][["step", "frame"]].astype(int).astype(str).join(numbers)
    rate, nodes = (frames - 1) / max(laps.without("writing"), 1e-9), Trajectories(job.data)[job.trajectory].nodes
    speed = f"{rate:.3g} steps/s ({rate * nodes:.2g} particles/s)"
    title = f"{shown}: {frames} frames, {speed}; the whole table is {shown.with_suffix('.csv')}"
    print_table(title, ["step", "frame", *header.values()], rows.values.tolist())
    if stopped:
        remedies = ["train longer"]
        remedies += ["use a shorter data.horizon"] if job.spec.horizon > 1 else []
        remedies += ["keep nodes in the box with --bounds"] if _has_free_walls(job) else []
        raise Failure(
            f"{shown}: stopped at {stopped}; the file has the {frames} frames before it; {', or '.join(remedies)}"
        )
    return table
