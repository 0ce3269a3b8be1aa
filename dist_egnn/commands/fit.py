"""`dist_egnn.fit`: partition and train from Python, on a file or on arrays."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import config as configs
from ..config import Config
from ..data.trajectories import Writer
from ..errors import Failure
from ..train import run_dir
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
