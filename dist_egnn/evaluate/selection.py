"""`train.select: rollout`: the error of rollouts of the validation trajectories, which chooses the best checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import Module

from ..config import Config
from ..data import dataset, identity
from ..data.store import open_store
from ..data.trajectories import Trajectories
from ..distributed.comm import Comm
from ..errors import Failure
from . import metrics, rollout
from .boundary_conditions import RolloutJob
from .simulation import Simulation

MOST_ROLLOUTS = 5  # of a trajectory


def trajectories_file(config: Config) -> str:
    """The file of the rollouts: train.select_data, data.path, or the file beside a store that it was made from.

    Raises Failure where it is missing, holds other validation data, or trajectories shorter than train.select_steps.
    """
    path, given = Path(config.data.path), config.train.select_data
    is_store = dataset.is_store(config.data.path)
    file = Path(given) if given else path.parent / open_store(path).inputs["source"] if is_store else path
    if not file.is_file():
        remedy = f"set train.select_data to the trajectories.h5 that {path} was made from"
        raise Failure(f"train.select=rollout: needs trajectories, and {file} is no file; {remedy}")
    trained, now = identity.of_data(path), identity.of_data(file)
    if trained and now and (changed := identity.changes(trained, now, config.data, ("valid",))):
        raise Failure(
            f"train.select_data={file}: other validation data than {path}: {', '.join(changed)}; use its file"
        )
    with_valid = Trajectories(file)
    if not list(_windows(config, with_valid)):
        raise Failure(f"train.select=rollout: {file} has no trajectory in split 'valid'; set train.select=one_step")
    with_valid.close()
    return str(file.absolute())


def _windows(config: Config, file: Trajectories) -> Iterator[tuple[int, int]]:
    """Trajectory and first frame of each rollout: up to MOST_ROLLOUTS cover a trajectory evenly."""
    d, steps = config.data, config.train.select_steps
    for k, trajectory in enumerate(file):
        if trajectory.split != "valid":
            continue
        first = rollout.first_frame(d, file, k, None)
        frames = trajectory.frames - 1 - first
        if (most := frames // d.horizon) < steps:
            what = f"trajectory {k} of {file.path} ends {most} steps after frame {first}"
            raise Failure(f"train.select_steps={steps}: {what}; use at most {most}")
        count = min(-(-most // steps), MOST_ROLLOUTS)
        starts = np.linspace(first, first + frames - steps * d.horizon, count).astype(int)
        yield from ((k, start) for start in starts.tolist())


def rollout_error(comm: Comm, config: Config, model: Module, features: Sequence[str]) -> float:
    """The MSE of rollouts of train.select_steps steps, a mean over steps and rollouts. A collective; equal on all ranks.

    A rollout that has to stop counts for its other steps with the square of the distance at which rollouts are stopped,
    so that later is better. config: with velocity_scale as trained; features: data.features without null.
    """
    file = Trajectories(config.train.select_data)
    section = replace(dataset.used_partition(config), parts=comm.size)
    spec = replace(dataset.sample_spec(config.data, features), pushforward=0)
    placed, total = replace(config, partition=section), torch.zeros(2, dtype=torch.float64)
    group, groups, steps = comm.world.rank // comm.size, comm.world.size // comm.size, config.train.select_steps
    for k, start in list(_windows(config, file))[group::groups]:
        job = RolloutJob(placed, "", str(file.path), spec, k, start, steps, repartition=1, bounds="none", out="")
        simulation = Simulation(comm, job, model, watch=False)
        errors, moving = [], ~simulation.conditions.fixed
        for state in simulation:
            y = simulation.true_position(state.frame)
            errors.append(metrics.position_mse(state.x[moving], y[moving]))  # type: ignore[index]
        missing = steps + 1 - len(errors)
        total += torch.tensor([sum(errors) + missing * simulation.conditions.limit**2, steps])
        simulation.data.close()
    file.close()
    total = comm.world.sum(total * (comm.rank == 0))
    return float(total[0] / total[1])
