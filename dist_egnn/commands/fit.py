"""`dist_egnn.fit` and `save`: training from Python, on a file or on arrays, or by a loop of the user."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.nn import Module

from .. import config as configs
from ..config import Config
from ..data import identity
from ..data.dataset import Dataset
from ..data.trajectories import Writer
from ..errors import Failure
from ..train import run_dir
from .import_weights import write_run
from .train import run_training

Arrays = Mapping[str, Any]  # the arguments of `Writer.add`


def fit(
    config: Config | Mapping[str, Any] | str | Path, trajectories: str | Path | Sequence[Arrays] | None = None
) -> Path:
    """Partition, train, and return the folder of the run: `dist_egnn.load` makes its model a function.

    config: a Config, a YAML file, or values by key, as {"train.epochs": 10}. trajectories, in place of data.path: a
    trajectories.h5 or a store, or arrays, for each trajectory the arguments of `Writer.add` (position (T, N, 3), split,
    dt, …), which are written to trajectories.h5 in the run's folder. Raises Failure as `distegnn train` does.
    """
    if isinstance(config, Config):
        settings = copy.deepcopy(config)
        configs.check(settings)
    else:
        settings = configs.load(None, config) if isinstance(config, Mapping) else configs.load(config)
    if isinstance(trajectories, str | Path):
        settings.data.path = str(trajectories)
    elif trajectories is not None:
        run_dir.check_new_run(settings)
        settings.data.path = str(_write(Path(settings.run.dir, "trajectories.h5"), trajectories))
    run_training(settings)
    return Path(settings.run.dir)


def save(model: Module, config: Config, samples: Dataset) -> Path:
    """Make a run of a model that a loop of your own trained, in run.dir, and return this folder.

    config: of the model and of the ``samples`` that `open_dataset` made. `dist_egnn.load`, `distegnn evaluate`, `rollout`
    and `export` read the run. Raises Failure for weights that do not fit the config, and for a folder with a run.
    """
    chosen = copy.deepcopy(samples.complete(config))
    write_run(model, chosen, samples.widths, Path(config.run.dir), data=identity.of_data(config.data.path))
    return Path(config.run.dir)


def _write(path: Path, trajectories: Sequence[Arrays]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with Writer(path, {"command": "dist_egnn.fit"}) as out:
        for k, trajectory in enumerate(trajectories):
            try:
                out.add(**{"source": "arrays", **trajectory})
            except TypeError as error:
                remedy = "pass position, split and dt, and what else dist_egnn.Writer.add takes"
                raise Failure(f"trajectories[{k}]: {str(error).partition(') ')[2] or error}; {remedy}") from error
    return path
