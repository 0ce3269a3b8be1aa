"""Rollout: a model fed with its own predictions, on one process or many; the file it writes; its errors step by step.

Every process holds the positions and velocities of all N nodes, computes its own nodes' next positions on the graph among
them (as in training on partitions: what crosses the cuts goes through the virtual nodes, in halo mode along the edges too), and one
sum of (N, 3) numbers, each of which all processes but one leave zero, gives everyone the whole next frame. So nodes change
owner without being sent, and rank 0 has each frame to write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment

from .. import config as configs
from ..data import graphs, halo
from ..data.dataset import sample_spec
from ..data.halo import Halo
from ..data.samples import SampleSpec, feature_columns
from ..data.store import Store
from ..data.trajectories import Trajectories
from ..distributed import spawn
from ..distributed.comm import Comm
from ..errors import Failure
from ..partition import assign
from ..train import checkpoint, preflight, run_dir, trainer
from ..utils import part_weights
from ..utils.console import print_table
from ..utils.filesystem import lock_output, write_atomically
from ..utils.progress import progress_bar
from . import metrics
from .boundary_conditions import BOUNDS, Job, Scene, parse_fixed
from .vtkhdf import Rollout, Writer, finish, partial_of


class Owners:
    """Who owns which node, and the edges among a process's own."""

    def __init__(self, comm: Comm, job: Job, nodes: int, side: np.ndarray | None = None) -> None:
        self.comm, self.job, self.part, self.side = comm, job, np.zeros(nodes, np.int64), side

    def edges(self, x: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Halo | None]:
        """The nodes that this process owns at a step, ascending, and source and destination of their edges, by rank in them.

        The edges are those of the whole graph (radius, edge dropping) whose ends have one owner. Rank 0 alone partitions;
        with edge dropping it also finds, in each step, the last edge of the whole graph that is kept. In halo mode every process
        finds all edges, and gets its halo.
        """
        job, comm, spec = self.job, self.comm, self.job.spec
        if comm.size == 1:
            return np.arange(len(x)), *graphs.sample_edges(x, spec.radius, spec.edge_drop, self.side), None
        due, last = step % job.repartition == 0, np.zeros(3)
        exchange = job.config.partition.halo == "exchange"
        part = np.zeros_like(self.part)
        if exchange or (comm.rank == 0 and (due or spec.edge_drop)):
            src, dst = graphs.sample_edges(x, spec.radius, spec.edge_drop, self.side)
            if due and comm.rank == 0:
                place = x if self.side is None else graphs.wrap(x, self.side)  # as partition/snapshot.py
                part = assign.assign(job.method, place, src, dst, comm.size, job.method_seed, job.owned)
                part = part if step == 0 else renamed(part, self.part, comm.size, job.owned)
            last = last if exchange else self._last(x, src, dst)
        if due:
            self.part = comm.sum(torch.from_numpy(part)).numpy()
        if exchange:
            about = {"number": step, "where": f"step {step + 1}", "radius": spec.radius, "side": self.side}
            return halo.extract_part(src, dst, self.part, comm.rank, comm.size, **about)
        own = np.flatnonzero(self.part == comm.rank)
        src, dst = graphs.radius_edges(x[own], spec.radius, self.side)
        if spec.edge_drop:
            limit = tuple(comm.sum(torch.from_numpy(last)).numpy())
            squared, to, by = self._keys(x, own[src], own[dst])
            kept = (squared < limit[0]) | (
                (squared == limit[0]) & ((to < limit[1]) | ((to == limit[1]) & (by <= limit[2])))
            )
            src, dst = src[kept], dst[kept]
        return own, src, dst, None

    def _keys(self, x: np.ndarray, src: np.ndarray, dst: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What edge dropping sorts by: the squared length, then the order of edges."""
        return graphs.squared_lengths(x, src, dst, self.side), dst, src

    def _last(self, x: np.ndarray, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        if not len(src):
            return np.array([-1.0, 0, 0])
        keys = self._keys(x, src, dst)
        order = np.lexsort(keys[::-1])
        return np.array([key[order[-1]] for key in keys], np.float64)


def renamed(part: np.ndarray, before: np.ndarray, parts: int, owned: Sequence[float] | None = None) -> np.ndarray:
    """The same partition with its parts numbered so that most nodes stay with their owner; owned: parts of different weights
    keep theirs."""
    shared = np.zeros((parts, parts), np.int64)
    np.add.at(shared, (part, before), 1)
    if owned is not None:
        shared[np.not_equal.outer(owned, owned)] = -len(part) - 1  # never worth it
    return linear_sum_assignment(shared, maximize=True)[1][part]


def roll(comm: Comm, job: Job) -> str:
    """Roll out on every process; rank 0 writes the frames. Returns why it stopped early, empty if it did not."""
    data = Trajectories(job.data)
    scene = Scene(data, job)
    model = trainer.build_model(job.config, (len(job.spec.features), len(job.spec.node_attributes)), comm)
    checkpoint.load_weights(model, checkpoint.load(Path(job.weights)), Path(job.weights))
    model = model.double() if job.double else model.to(trainer.resolve_device(job.config, comm.rank))
    model.eval()
    x, v = (read(job.trajectory, job.start).astype(scene.dtype) for read in (data.position, data.velocity))
    owners = Owners(comm, job, len(x), scene.side)
    a = feature_columns(job.spec.node_attributes, v, scene.attributes.__getitem__)

    def true(step: int) -> np.ndarray | None:
        frame = job.start + step * job.spec.horizon
        return data.position(job.trajectory, frame) if frame < scene.trajectory.frames else None

    out: _Output | None = None
    with contextlib.ExitStack() as stack, torch.no_grad():
        tick = stack.enter_context(progress_bar("rolling out", job.steps, enabled=comm.rank == 0))
        for step in range(job.steps):
            predicted, z = _predict(model, comm, job.spec, (x, v, a), owners.edges(x, step), scene)
            if comm.rank == 0:
                if out is None:  # only now is known how many virtual nodes there are
                    out = stack.enter_context(contextlib.closing(_Output(job, scene, len(z))))
                if step == 0:
                    out.add(x, v, owners.part, true(0), None)
            if problem := scene.lost(predicted, x):
                return f"step {step + 1}: {problem}"
            x, v = scene.settle(x, predicted)
            if out is not None:
                tick(out.add(x, v, owners.part, true(step + 1), z))
    return ""


def _predict(
    model: Any,
    comm: Comm,
    spec: SampleSpec,
    state: tuple[np.ndarray, ...],
    mine: tuple[np.ndarray, np.ndarray, np.ndarray, Halo | None],
    scene: Scene,
) -> tuple[np.ndarray, np.ndarray]:
    """The whole next frame (N, 3) and the virtual nodes (C, 3), of state (x, v, a) and this process's (nodes, src, dst, halo)."""
    (x, v, a), (own, src, dst, beyond) = state, mine
    f = feature_columns(spec.features, v, scene.attributes.__getitem__)
    fields = {name: torch.from_numpy(value[own]) for name, value in (("x", x), ("v", v), ("f", f), ("a", a))}
    fields["total"] = torch.full((len(own),), len(x))
    fields["centroid"] = torch.from_numpy(x.astype(np.float64).mean(0)).expand(len(own), 3).contiguous()
    graph = graphs.build_graph(src, dst, fields, scene.side)
    if beyond is not None:
        halo.attach(graph, halo.Halos([beyond], [len(own)]))
    predicted, z = model(graph)
    whole = torch.zeros(x.shape, dtype=torch.from_numpy(x).dtype)
    whole[torch.from_numpy(own)] = predicted.cpu()
    return comm.sum(whole).numpy(), z[0].cpu().numpy()


class _Output:
    """The file as rank 0 writes it."""

    def __init__(self, job: Job, scene: Scene, virtual: int) -> None:
        meta = {
            "model": job.config.model.name,
            "weights": job.weights,
            "data": job.data,
            "trajectory": job.trajectory,
            "start": job.start,
            "horizon": job.spec.horizon,
            "dt": scene.trajectory.dt,
            "true_frames": scene.trajectory.frames,
            "velocity": "stored" if scene.trajectory.velocity else "per frame",
            "bounds": job.bounds,
            "fixed": job.fixed,
            "repartition": job.repartition,
        }
        self.file = Writer(
            Path(job.out), job.steps + 1, len(scene.held), meta, scene.attributes, scene.box, virtual, scene.dtype
        )

    def add(
        self, x: np.ndarray, v: np.ndarray, part: np.ndarray, true: np.ndarray | None, virtual: np.ndarray | None
    ) -> str:
        """Write a frame; a note for the progress display."""
        error = None if true is None else x.astype(np.float64) - true
        self.file.add(x, v, part, error, virtual)
        return "" if error is None else f"MSE {np.square(error).mean():.3e}"

    def close(self) -> None:
        self.file.close()


def error_table(path: Path) -> pd.DataFrame:
    """A row a step of a rollout's file: errors against the true frame, beside the static and the linear prediction's.

    Static: the first frame; linear: the first frame and its velocity, unfitted. Energies and radii take the attribute `mass`, or
    one each. Velocities of the truth, like the rollout's own, are differences over a step. Columns are NaN where the data end.
    """
    found = []
    with Rollout(path) as rollout:
        meta, mass = rollout.meta, rollout.attributes.get("mass")
        stored = meta["velocity"] == "stored"
        unit = meta["horizon"] * meta["dt"]
        to_time = 1.0 if stored else 1 / meta["dt"]
        before: np.ndarray | None = None
        for frame in rollout:
            x = frame.position.astype(np.float64)
            if frame.step == 0:
                x0, v0 = x, frame.velocity.astype(np.float64)
            row: dict[str, float] = {"step": frame.step, "frame": frame.frame, "time": frame.time}
            row["kinetic_energy"] = metrics.kinetic_energy(frame.velocity * to_time, mass)
            row["radius_of_gyration"] = metrics.radius_of_gyration(x, mass)
            if frame.error is not None:
                y = x - frame.error
                ahead = frame.step * (unit if stored else meta["horizon"])
                row["mse"] = metrics.position_mse(x, y)
                row["mae"] = metrics.mean_absolute_error(x, y)
                row["displacement"] = metrics.displacement_error(x, y)
                row["static_mse"], row["linear_mse"] = metrics.baselines(x0, v0, ahead, y)
                row["rmsd"] = metrics.rmsd(x, y, mass)
                true_v = v0 * to_time if before is None else (y - before) / unit
                row["true_kinetic_energy"] = metrics.kinetic_energy(true_v, mass)
                row["true_radius_of_gyration"] = metrics.radius_of_gyration(y, mass)
                before = y
            found.append(row)
    names = ["step", "frame", "time", "mse", "mae", "displacement", "static_mse", "linear_mse", "rmsd"]
    names += [f"{true}{name}" for name in ("kinetic_energy", "radius_of_gyration") for true in ("", "true_")]
    return pd.DataFrame(found, columns=names)


def _show(path: Path, table: pd.DataFrame, rows: int = 10) -> None:
    """The table on the terminal: at most so many steps, evenly spaced, the last among them."""

    def text(value: float) -> str:
        return "" if np.isnan(value) else f"{value:.3e}"

    picked = np.unique(np.linspace(min(1, len(table) - 1), len(table) - 1, rows).round().astype(int))
    shown = [
        [str(int(r.step)), str(int(r.frame))]
        + [text(v) for v in (r.mse, r.static_mse, r.linear_mse, r.mae, r.kinetic_energy, r.true_kinetic_energy)]
        for r in table.iloc[picked].itertuples()
    ]
    header = ["step", "frame", "MSE", "static", "linear", "MAE", "energy", "true"]
    print_table(f"{path}: {len(table)} frames; the whole table is {path.with_suffix('.csv')}", header, shown)


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
) -> tuple[Job, int]:
    """The job of a run's best checkpoint, and how many processes it takes: parts, or as many as share a graph in training.

    Raises Failure for what cannot be.
    """
    run_dir.check_is_run(run)
    config = configs.load(run / run_dir.CONFIG)
    try:
        trainer.resolve_device(config)
    except Failure as failure:  # nothing on this command line sets it: the run's file does
        raise Failure(f"{run / run_dir.CONFIG}: {failure}") from failure
    store = Store(config.data.path) if Path(config.data.path, "manifest.yaml").is_file() else None
    if data is None and not Path(config.data.path).is_file():
        name = f", which was made from a file {store.inputs['source']}" if store else ""
        raise Failure(
            f"{run}: was trained on {config.data.path}{name}; name the trajectories.h5 to roll out with --data"
        )
    file = Trajectories(data or config.data.path)
    if not 0 <= trajectory < len(file):
        raise Failure(f"--trajectory {trajectory}: {file.path} has trajectories 0 to {len(file) - 1}")
    start = max(config.data.first_frame, 0) if start is None else start
    latest = file[trajectory].frames - 1 - (not file[trajectory].velocity)  # a forward difference needs the next frame
    if not 0 <= start <= latest:
        raise Failure(f"--start {start}: trajectory {trajectory} of {file.path} can start at frames 0 to {latest}")
    for name, value in (("steps", steps), ("repartition", repartition)):
        if value < 1:
            raise Failure(f"--{name} {value}: must be at least 1")
    if bounds not in BOUNDS:
        raise Failure(f"--bounds {bounds}: use one of {', '.join(BOUNDS)}")
    if out.suffix not in (".vtkhdf", ".hdf"):
        raise Failure(f"--out {out}: must end in .vtkhdf, by which ParaView knows the format")
    for path in (out, out.with_suffix(".csv")):
        if path.exists():
            raise Failure(f"{path}: exists; remove it or choose another --out")
    d = config.data
    features = d.features
    if features is None:
        features = store.inputs["features"] if store else [*file[0].attributes, "speed"]
    trained = store.parts if store else config.partition.parts or 1
    size = trained if parts is None else parts
    method = store.inputs["method"] if store else config.partition.method
    owned = store.inputs["weights"] if store else part_weights.validate(config.partition.weights, trained)
    owned = owned if size == trained else None
    assign.check_method(method, size, owned)
    assign.check_size(file[trajectory].nodes, size, owned)
    preflight.check_rollout(config, file, trajectory, start, size, method)
    job = Job(
        config,
        str((run / run_dir.BEST).absolute()),
        str(file.path.absolute()),
        sample_spec(d, features),
        trajectory,
        start,
        steps,
        repartition,
        method,
        store.inputs["method_seed"] if store else config.partition.seed,
        owned,
        bounds,
        None if fixed is None else parse_fixed(fixed),
        str(out.absolute()),
    )
    Scene(file, job)  # what it refuses is refused before processes start
    file.close()
    return job, size


def run_rollout(run: Path, **options: Any) -> pd.DataFrame:
    """Roll out, write the table beside the file, and show it. Raises Failure for a rollout that had to be stopped.

    Whatever ends it, but a kill of this process too, leaves under --out the frames that were whole.
    """
    job, size = prepare(run, **options)
    out = Path(job.out)
    shown = options["out"]
    with lock_output(out, "another rollout is writing it; wait for it, or choose another --out"):
        partial_of(out).unlink(missing_ok=True)  # of one that was killed
        try:
            stopped = spawn.run_ranks(roll, size, job, timeout_s=job.config.train.timeout_s)[0]
        finally:
            done = finish(out) if partial_of(out).is_file() else 0
            if 0 < done < job.steps + 1:
                print(f"{shown}: {done} of {job.steps + 1} frames")
    table = error_table(out)
    write_atomically(out.with_suffix(".csv"), table.to_csv(index=False).encode())
    _show(shown, table)
    if stopped:
        raise Failure(
            f"{shown}: stopped at {stopped}; the file has the {done} frames before it. Train longer, take a shorter "
            "horizon, or keep nodes in the box with --bounds"
        )
    return table
