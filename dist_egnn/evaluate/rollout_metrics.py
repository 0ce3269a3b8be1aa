"""`distegnn evaluate --rollout`: rollouts of several trajectories against the truth, as the field judges simulators.

MSE, kinetic energy and Sinkhorn distance are the measures of LagrangeBench (Toshev et al. 2023); density, front and the
share of nodes outside the box are those of fluids.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial import KDTree

from .. import config as configs
from ..data import graphs, identity
from ..data.trajectories import Trajectories
from ..distributed import spawn
from ..distributed.comm import Comm
from ..errors import Failure
from ..ops import tiled_layer
from ..train import run_dir
from ..utils.filesystem import lock_output, sha256, write_atomically
from ..utils.progress import progress_bar
from . import metrics, rollout, sinkhorn
from .boundary_conditions import RolloutJob
from .simulation import Simulation, State
from .step_errors import BASELINES, StepErrors

FILE = "evaluate-rollout.csv"
MARKS = (1, 5, 10, 20)  # steps that the summary shows, besides the last one
FRONT = 0.95  # quantile of the coordinate along the flow that is its front


class Measures:
    """Rows of the table, by step of one rollout. A collective."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation, self.job = simulation, simulation.job
        conditions = simulation.conditions
        self.errors: StepErrors | None = None
        self.box = metrics.walls(conditions.box, conditions.trajectory.axes)
        self.gravity = None if conditions.around is None else conditions.around[0]
        fifths = np.linspace(0, self.job.steps, 6).round().astype(int).tolist()
        self.sinkhorn_steps = {*MARKS, *fifths[1:]}
        self.flow = self._flow()
        self.blur = self._spacing()

    def _true(self, step: int) -> np.ndarray:
        y = self.simulation.true_position(self.job.start + step * self.job.spec.horizon)
        assert y is not None  # as `evaluate_rollouts` has checked
        return y.astype(np.float64)

    def _flow(self) -> np.ndarray | None:
        """The horizontal direction (3,) in which the true nodes travel most from the first to the last step: the first
        principal axis of their displacements normal to gravity. None without gravity."""
        gravity = self.simulation.conditions.trajectory.gravity if self.gravity is None else self.gravity
        if gravity is None or not np.any(gravity):
            return None
        down = np.asarray(gravity, np.float64) / np.linalg.norm(gravity)
        moved = self._true(self.job.steps) - self._true(0)
        moved -= np.outer(moved @ down, down)
        direction = np.linalg.eigh(moved.T @ moved)[1][:, -1]
        return direction * (1 if (moved @ direction).sum() >= 0 else -1)

    def _tree(self, x: np.ndarray) -> tuple[KDTree, np.ndarray]:
        side = self.simulation.conditions.side
        x = x if side is None else graphs.wrap(x, side)
        return KDTree(x, boxsize=graphs.boxsize(side), balanced_tree=False, compact_nodes=False), x

    def _spacing(self) -> float:
        """The mean distance of a node to the nearest one, in the first frame."""
        tree, x = self._tree(self._true(0))
        return float(tree.query(x, k=2)[0][:, 1].mean()) if len(x) > 1 else 1.0

    def row(self, state: State) -> dict[str, float]:
        """The measures of a state."""
        trajectory, job = self.simulation.conditions.trajectory, self.job
        per_time = 1 / trajectory.dt if self.simulation.conditions.velocity == "per frame" else 1.0
        x, v, y = state.x.astype(np.float64), state.v.astype(np.float64) * per_time, self._true(state.step)
        moving = ~self.simulation.conditions.fixed
        if self.errors is None:
            mass = self.simulation.conditions.attributes.get("mass")
            about = job.spec.horizon * trajectory.dt, mass, self.gravity, self.box
            self.errors = StepErrors(x, v, moving, *about)
        row: dict[str, float] = {"trajectory": job.trajectory, "step": state.step, "frame": state.frame}
        row |= {"time": state.frame * trajectory.dt, "nodes": len(x), "seconds": self.simulation.seconds}
        row |= self.errors.row(state.step, x, v, y)
        energy, true = row["kinetic_energy"], row["true_kinetic_energy"]
        row["energy_error"] = abs(energy - true) / true if true else np.nan
        if state.step in self.sinkhorn_steps:
            row["sinkhorn"] = sinkhorn.divergence(x[moving], y[moving], self.blur, comm=self.simulation.comm)
        for true_, position in (("", x), ("true_", y)):
            row |= {f"{true_}{name}": value for name, value in self._of_cloud(position, moving).items()}
        return row

    def _of_cloud(self, x: np.ndarray, moving: np.ndarray) -> dict[str, float]:
        """Mean and largest number of neighbours within data.radius, the front, and the share of nodes outside the box."""
        result = {}
        if np.isfinite(radius := self.job.spec.radius):
            tree, wrapped = self._tree(x)
            near = tree.query_ball_point(wrapped[moving], radius, return_length=True) - 1
            result = {"neighbours": float(near.mean()), "max_neighbours": float(near.max())}
        if self.flow is not None:
            result["front"] = float(np.quantile(x[moving] @ self.flow, FRONT))
        if self.box is not None:
            low, high = self.box.astype(np.float64)
            result["outside"] = float(((x[moving] < low) | (x[moving] > high)).any(1).mean())
        return result


COLUMNS = ["trajectory", "step", "frame", "time", "nodes", "seconds", "mse", *(f"{name}_mse" for name in BASELINES)]
COLUMNS += ["kinetic_energy", "true_kinetic_energy", "energy_error", "sinkhorn"]
OF_CLOUD = ("neighbours", "max_neighbours", "front", "outside")
COLUMNS += [f"{true}{name}" for name in OF_CLOUD for true in ("", "true_")]


def measure(comm: Comm, jobs: Sequence[RolloutJob]) -> tuple[list[dict[str, float]], dict[int, str]]:
    """Rows of all rollouts, and why some stopped early, by trajectory. A collective."""
    rows, stopped = [], {}
    model = rollout.load_model(comm, jobs[0])
    steps = sum(job.steps + 1 for job in jobs)
    with (
        tiled_layer.tile_threads(jobs[0].config.train.threads),
        progress_bar("rolling out", steps, enabled=comm.rank == 0) as tick,
    ):
        for job in jobs:
            simulation = Simulation(comm, job, model)
            measures = Measures(simulation)
            for state in simulation:
                rows.append(measures.row(state))
                tick(f"trajectory {job.trajectory}  MSE {rows[-1]['mse']:.3e}")
            if simulation.stopped:
                stopped[job.trajectory] = simulation.stopped
    return rows, stopped


def check_length(file: Trajectories, k: int, data: configs.Data, steps: int, start: int | None = None) -> None:
    """Raise Failure where trajectory ``k`` ends before a rollout of ``steps`` from frame ``start`` does."""
    start = rollout.first_frame(data, file, k, start)
    last = (file[k].frames - 1 - start) // data.horizon
    if last < steps:
        what = f"trajectory {k} of {file.path} ends {last} steps after frame {start}"
        raise Failure(f"rollout of {steps} steps: {what}; use at most {last} steps, or an earlier start")


def evaluate_rollouts(
    run: Path, steps: int, *, trajectory: int | str = "test", data: Path | None = None, **options: Any
) -> tuple[pd.DataFrame, dict[int, str]]:
    """The measures of rollouts by trajectory and step (COLUMNS), and by trajectory why a rollout stopped early.

    trajectory: a number, all, train, valid or test; options: start and parts of `rollout.prepare_jobs`. Also written to
    evaluate-rollout.csv in the run's folder. Raises Failure where the true trajectory is shorter than the rollout.
    """
    best = run / run_dir.BEST
    jobs = rollout.prepare_jobs(run, trajectory=trajectory, steps=steps, out=None, data=data, **options)
    file = rollout.open_trajectories(run, run_dir.load_config(run), data)
    for job in jobs:
        check_length(file, job.trajectory, job.config.data, steps, job.start)
    weights, config = sha256(best), jobs[0].config
    given = config.partition.parts, jobs
    rows, stopped = spawn.run_ranks(measure, *given, timeout_s=config.train.timeout_s)[0]
    if sha256(best) != weights:
        raise Failure(f"{best}: was replaced during the evaluation; evaluate again")
    about = {"weights": weights, "data": identity.digest(identity.of_data(file.path)), "path": str(file.path)}
    table = pd.DataFrame(rows, columns=COLUMNS)
    every = [(job.trajectory, step) for job in jobs for step in range(steps + 1)]
    table = table.set_index(["trajectory", "step"]).reindex(every).reset_index().assign(**about)
    try:
        with lock_output(run / FILE, wait_s=10):
            write_atomically(run / FILE, table.to_csv(index=False).encode())
    except Failure as failure:  # a read-only run can be evaluated all the same
        print(f"warning: {str(failure).partition(';')[0]}; the measures are not written", file=sys.stderr)
    return table, stopped


def summarize(table: pd.DataFrame, marks: Sequence[int] = MARKS) -> pd.DataFrame:
    """Means over trajectories by step, at the marks and the last step, and their spread as columns NAME_std.

    rms, and static, linear and ballistic, which need no model: root mean square distance from the true positions at the
    step, √(3 MSE); mse: mean MSE of the steps up to it; energy_error, sinkhorn and outside: at the step. NaN where a
    rollout did not reach the step.
    """
    by_step = table.pivot(index="step", columns="trajectory")
    values = {"rms": (3 * by_step["mse"]) ** 0.5}
    values |= {name: (3 * by_step[f"{name}_mse"]) ** 0.5 for name in BASELINES}
    values["mse"] = by_step["mse"].loc[1:].expanding().mean().where(by_step["mse"].loc[1:].notna())
    values |= {name: by_step[name] for name in ("energy_error", "sinkhorn", "outside")}
    shown = [n for n in by_step.index if n in (*marks, by_step.index[-1])]
    means = {name: value.mean(axis=1, skipna=False) for name, value in values.items()}
    spreads = {f"{name}_std": value.std(axis=1, skipna=False) for name, value in values.items()}
    return pd.DataFrame(means | spreads).loc[shown]


def speed(table: pd.DataFrame) -> tuple[float, float, float]:
    """Seconds of all steps, steps per second, and particles per second."""
    last = table.dropna(subset="mse").groupby("trajectory").last()
    seconds = last["seconds"].sum()
    return seconds, last["step"].sum() / seconds, (last["step"] * last["nodes"]).sum() / seconds
