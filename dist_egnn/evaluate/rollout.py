"""Rollout: feed a model with its own predictions, on one process or several; the file it writes; its errors by step.

Every process holds positions and velocities of all N nodes and computes the next positions of the nodes that it owns.
One sum over processes of (N, 3) numbers, in which each process fills its own rows, gives all of them the next frame.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import Module

from .. import config as configs
from ..data import checks, dataset, domain, graphs, halo, identity
from ..data.fixed_nodes import check_fixed, fixed_nodes, moving_nodes
from ..data.samples import count_columns, edge_positions, feature_columns, first_input, given_edges, past_velocities
from ..data.store import open_store
from ..data.trajectories import Trajectories
from ..distributed import spawn
from ..distributed.comm import Comm
from ..errors import Failure
from ..ops import tiled_layer
from ..partition import assign
from ..train import checkpoint, preflight, run_dir, trainer
from ..utils import part_weights
from ..utils.console import print_table
from ..utils.filesystem import lock_output, write_atomically
from ..utils.progress import progress_bar
from . import metrics
from .boundary_conditions import BOUNDS, LIMIT, BoundaryConditions, RolloutJob
from .repartition import LocalGraph, Repartitioner
from .stability import Stability
from .vtkhdf import Rollout, RolloutWriter, finish, partial_path


def roll_out(comm: Comm, job: RolloutJob) -> tuple[str, float]:
    """Roll out on every process; rank 0 writes the frames.

    Returns why it stopped early, empty if it did not, and the seconds that its steps took, without writing.
    """
    data = Trajectories(job.data)
    conditions = BoundaryConditions(data, job)
    names = job.spec.features, job.spec.node_attributes
    model = trainer.build_model(job.config, (count_columns(data, names[0]), count_columns(data, names[1])), comm)
    checkpoint.load_weights(model, checkpoint.load(Path(job.weights)), Path(job.weights))
    model = (model.double() if job.double else model.to(trainer.resolve_device(job.config, comm.rank))).eval()
    x = data.position(job.trajectory, job.start).astype(conditions.dtype)
    velocities = past_velocities(data, job.trajectory, job.start, job.spec)
    v, past = (velocities.get(name, x[:, :0]).astype(conditions.dtype) for name in ("v", "past"))
    per_frame = job.spec.horizon if conditions.around else 1
    stability = Stability(data, job, x, v, conditions.side)
    given = given_edges(data, job.trajectory, job.spec.rule)
    partition = Repartitioner(comm, job, len(x), conditions.side, given)

    def add_frame(step: int, z: np.ndarray | None) -> str:
        """Write the present frame; returns its error for the progress bar."""
        frame = job.start + step * job.spec.horizon
        known = frame < conditions.trajectory.frames
        error = x.astype(np.float64) - data.position(job.trajectory, frame) if known else None
        writer.add(x, v / per_frame, partition.part, error, z)
        return "" if error is None else f"MSE {np.square(error[~conditions.fixed]).mean():.3e}"

    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(tiled_layer.tile_threads(job.config.train.threads))
        tick = stack.enter_context(progress_bar("rolling out", job.steps, enabled=comm.rank == 0))
        seconds = 0.0
        for step in range(job.steps):
            started = time.perf_counter()
            attribute = conditions.attributes_at(step)
            scaled = v * np.asarray(job.spec.velocity_scale, v.dtype)
            columns = [feature_columns(listed, scaled, attribute) for listed in names]
            state = dict(zip(("x", "v", "past", "f", "a"), (x, scaled, past, *columns), strict=True))
            local = partition.local_graph(edge_positions(state, conditions.around and conditions.around[0]), step)
            predicted, z = _predict(model, comm, conditions, local, state)
            if comm.rank == 0 and step == 0:  # the number of virtual nodes is known now
                writer = stack.enter_context(_writer(conditions, len(z)))
                writing = time.perf_counter()
                add_frame(0, None)
                started += time.perf_counter() - writing
            if problem := conditions.problem(predicted, x):
                return f"step {step + 1}: {problem}", seconds
            past = np.concatenate([v, past], 1)[:, : past.shape[1]]
            x, v = conditions.apply(x, predicted, step + 1)
            problem = stability.problem(step + 1, x, v, warn=comm.rank == 0)
            seconds += time.perf_counter() - started
            if problem:
                return f"step {step + 1}: {problem}", seconds
            if comm.rank == 0:
                tick(add_frame(step + 1, z))
    return "", seconds


def _predict(
    model: Module, comm: Comm, conditions: BoundaryConditions, local: LocalGraph, state: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the next frame (N, 3) and of the virtual nodes (C, 3), from the fields of all nodes."""
    x, (own, src, dst, own_halo) = state["x"], local
    fields = {name: torch.from_numpy(value[own]) for name, value in state.items()}
    fields["total"] = torch.full((len(own),), len(x))
    fields["centroid"] = torch.from_numpy(x.astype(np.float64).mean(0)).expand(len(own), 3).contiguous()
    graph = graphs.build_graph(src, dst, fields, conditions.side)
    if conditions.around:
        domain.attach(graph, domain.make_domain(*conditions.around, conditions.side))
    if own_halo is not None:
        halo.attach(graph, halo.Halos([own_halo], [len(own)]))
    predicted, z = model(graph)
    whole = torch.zeros(x.shape, dtype=torch.from_numpy(x).dtype)
    whole[torch.from_numpy(own)] = predicted.cpu()
    return comm.sum(whole).numpy(), z[0].cpu().numpy()


def _writer(conditions: BoundaryConditions, virtual: int) -> RolloutWriter:
    job, trajectory = conditions.job, conditions.trajectory
    names = ("weights", "data", "trajectory", "start", "bounds", "repartition")
    meta = {name: getattr(job, name) for name in names}
    meta |= {"fixed": job.spec.fixed, "model": job.config.model.name, "horizon": job.spec.horizon, "dt": trajectory.dt}
    if conditions.around:
        meta["gravity"] = conditions.around[0].tolist()
    meta |= {"true_frames": trajectory.frames, "velocity": conditions.velocity}
    size = job.steps + 1, trajectory.nodes, virtual
    return RolloutWriter(Path(job.out), size, meta, conditions.attributes, conditions.box, conditions.dtype)


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


def error_table(path: Path) -> pd.DataFrame:
    """Errors of a rollout's file by frame; also of the first frame (static), of that moved by its velocity (linear) and,
    of a simulator's, of free flight that ends at the walls (ballistic).

    Energies and radii of gyration use the attribute `mass`, else mass 1. True velocities are differences over a step,
    as in the rollout. Errors are those of the nodes that move. NaN where the data have ended.
    """
    rows = []
    with Rollout(path) as rollout:
        meta, mass, at = rollout.meta, rollout.attributes.get("mass"), rollout.moving
        mass = mass.ravel() if mass is not None and mass.size == rollout.nodes else None
        per_frame, step_time = meta["velocity"] == "per frame", meta["horizon"] * meta["dt"]
        per_time = 1 / meta["dt"] if per_frame else 1.0
        flight: Iterator[np.ndarray] = iter(())
        for frame in rollout:
            x = frame.position.astype(np.float64)
            if frame.step == 0:
                x0, v0, previous = x, frame.velocity.astype(np.float64), x
                if "gravity" in meta:
                    flight = metrics.ballistic(x0, v0 * meta["horizon"], meta["gravity"], rollout.box)
            ballistic = next(flight, None)
            row: dict[str, float] = {"step": frame.step, "frame": frame.frame, "time": frame.time}
            row["kinetic_energy"] = metrics.kinetic_energy(frame.velocity * per_time, mass)
            row["radius_of_gyration"] = metrics.radius_of_gyration(x, mass)
            if frame.error is not None:
                y = x - frame.error
                true_v = (y - previous) / step_time if frame.step else v0 * per_time
                elapsed = frame.step * (meta["horizon"] if per_frame else step_time)
                static, linear = metrics.baselines(x0[at], v0[at], elapsed, y[at])
                row |= {"static_mse": static, "linear_mse": linear, "mse": metrics.position_mse(x[at], y[at])}
                if ballistic is not None:
                    row["ballistic_mse"] = metrics.position_mse(ballistic[at], y[at])
                row |= {"mae": metrics.mean_absolute_error(x[at], y[at])}
                row |= {"displacement": metrics.displacement_error(x[at], y[at])}
                row |= {"rmsd": metrics.rmsd(x, y, mass), "true_kinetic_energy": metrics.kinetic_energy(true_v, mass)}
                row["true_radius_of_gyration"] = metrics.radius_of_gyration(y, mass)
                previous = y
            rows.append(row)
    names = ["step", "frame", "time", "mse", "mae", "displacement", "static_mse", "linear_mse", "ballistic_mse", "rmsd"]
    names += [f"{true}{name}" for name in ("kinetic_energy", "radius_of_gyration") for true in ("", "true_")]
    return pd.DataFrame(rows, columns=names)


def _check_new(out: Path) -> None:
    if existing := [path for path in (out, out.with_suffix(".csv")) if path.exists()]:
        raise Failure(f"{existing[0]}: exists; remove it or choose another --out")


def _first_frame(data: configs.Data, file: Trajectories, k: int, start: int | None) -> int:
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


def prepare(
    run: Path,
    *,
    trajectory: int,
    steps: int,
    out: Path,
    parts: int | None = None,
    data: Path | None = None,
    start: int | None = None,
    repartition: int = 1,
    bounds: str = "none",
    fixed: str | None = None,
    limit: float = LIMIT,
) -> RolloutJob:
    """The job of a run's best checkpoint on ``parts`` processes, or on as many as shared a graph in training.

    Raises Failure for options and data that do not fit, and where a step needs more memory than is free.
    """
    config = run_dir.load_config(run)
    trained = checkpoint.load(run / run_dir.BEST).get("data")
    try:
        trainer.resolve_device(config)
    except Failure as failure:  # no option sets the device: name the file that does
        raise Failure(f"{run / run_dir.CONFIG}: {failure}") from failure
    store = open_store(config.data.path) if Path(config.data.path, "manifest.yaml").is_file() else None
    if data is None and not Path(config.data.path).is_file():
        source = f", which was made from a file {store.inputs['source']}" if store else ""
        raise Failure(f"{run}: was trained on {config.data.path}{source}; name a trajectories.h5 with --data")
    file = Trajectories(data or config.data.path)
    if not 0 <= trajectory < len(file):
        raise Failure(f"--trajectory {trajectory}: {file.path} has trajectories 0 to {len(file) - 1}")
    if data is not None:
        checks.warn_of_content(file)
    if trained and data is None:
        checkpoint.compare_data(trained, identity.of_data(file.path), config.data, run)
    elif trained:
        identity.check_fits(trained, identity.describe(file, [trajectory]), config.data, str(file.path), run)
    start = _first_frame(config.data, file, trajectory, start)
    if min(steps, repartition) < 1:
        raise Failure(f"--steps {steps}, --repartition {repartition}: both must be at least 1")
    if bounds not in BOUNDS:
        raise Failure(f"--bounds {bounds}: use one of {', '.join(BOUNDS)}")
    if out.suffix not in (".vtkhdf", ".hdf"):
        raise Failure(f"--out {out}: must end in .vtkhdf or .hdf, by which ParaView recognizes the format")
    _check_new(out)
    p = dataset.used_partition(config)
    processes = p.parts if parts is None else parts
    valid = part_weights.validate(p.weights, p.parts)
    weights = list(valid) if valid and processes == p.parts else None  # other numbers of processes have equal parts
    assign.check_method(p.method, processes, weights)
    assign.check_size(file[trajectory].nodes, processes, weights)
    preflight.check_rollout(config, file, trajectory, start, processes, p.method)
    config = replace(config, partition=replace(p, parts=processes, weights=weights))
    null = store.inputs["features"] if store else [*file[0].attributes, "speed"]  # without the identity of the data
    features = identity.resolve_features(config.data, trained)
    spec = dataset.sample_spec(config.data, null if features is None else features)
    best, trajectories, output = (str(path.absolute()) for path in (run / run_dir.BEST, file.path, out))
    if fixed is not None:
        if not configs.FIXED[0](fixed):
            raise Failure(f"--fixed {fixed}: {configs.FIXED[1]}")
        spec = replace(spec, fixed=fixed)
    check_fixed(file, spec.fixed, "data.fixed=" if fixed is None else "--fixed ")
    _warn_of_assumptions(file, trajectory, start, config.data.horizon, spec.fixed, bool(spec.past))
    spec = replace(spec, pushforward=0)
    job = RolloutJob(config, best, trajectories, spec, trajectory, start, steps, repartition, bounds, output, limit)
    BoundaryConditions(file, job)  # raises before processes start
    file.close()
    return job


def _has_free_walls(job: RolloutJob) -> bool:
    data = Trajectories(job.data)
    return job.bounds == "none" and data.box(job.trajectory) is not None and not data[job.trajectory].periodic


def run_rollout(run: Path, **options: Any) -> pd.DataFrame:
    """Roll out, write the table of errors beside the file, and print it. Raises Failure if the rollout had to stop.

    However it ends, unless this process is killed, --out contains all complete frames.
    """
    job = prepare(run, **options)
    processes, timeout_s = job.config.partition.parts, job.config.train.timeout_s
    out, shown = Path(job.out), options["out"]
    with lock_output(out, "another rollout is writing it; wait for it, or choose another --out"):
        _check_new(options["out"])  # again, now that no other rollout can write it
        partial_path(out).unlink(missing_ok=True)  # of a killed rollout
        stopped = "an error or interruption"
        try:
            stopped, seconds = spawn.run_ranks(roll_out, processes, job, timeout_s=timeout_s)[0]
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
    rate, nodes = (frames - 1) / max(seconds, 1e-9), Trajectories(job.data)[job.trajectory].nodes
    speed = f"{rate:.3g} steps/s ({rate * nodes:.2g} nodes/s)"
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
