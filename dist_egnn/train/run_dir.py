"""The files of a run's folder, and what a folder must contain before a command uses it. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import config as configs
from ..config import Config
from ..errors import Failure
from ..utils import filesystem

CONFIG, METRICS = "config.yaml", "metrics.csv"
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


def can_resume(folder: Path) -> bool:
    """Whether the folder holds a run with a checkpoint to resume from."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (LAST, PREVIOUS))


def check_is_run(folder: Path) -> None:
    """Raise Failure unless the folder is a run."""
    if not (folder / CONFIG).is_file():
        raise Failure(f"{folder}: not a run (no config.yaml); create one with `distegnn train`")


def weights_file(run_or_checkpoint: str | Path) -> Path:
    """The best.pt of a run's folder, or the checkpoint itself."""
    path = Path(run_or_checkpoint)
    return path / BEST if path.is_dir() else path


def load_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run. A run and its data may be moved or copied together: data.path is first taken relative to the
    run, as it was when config.yaml was written, then as it stands there. Raises Failure."""
    check_is_run(run)
    config = configs.load(run / CONFIG, overrides, published=True)
    written, path = Path(config.run.dir), config.data.path
    if written.is_absolute() and Path(path).is_absolute() and not any(o.startswith("data.path=") for o in overrides):
        beside = os.path.normpath(run.absolute() / os.path.relpath(path, written))
        config.data.path = beside if os.path.exists(beside) else path
    config.run.dir = str(run)
    return config


def write_config(config: Config) -> None:
    """Write config.yaml with the absolute path of the run, for `load_config`."""
    folder = Path(config.run.dir)
    placed = replace(config, run=replace(config.run, dir=str(folder.absolute())))
    filesystem.write_atomically(folder / CONFIG, configs.to_yaml(placed).encode())


def check_new_run(config: Config) -> None:
    """Raise Failure if a new run in run.dir would overwrite files of another one."""
    folder = Path(config.run.dir)
    if can_resume(folder):
        remedy = f"choose another run.dir, or resume it: distegnn train --resume {folder}"
        raise Failure(f"{folder}: holds a run already; {remedy}")
    for name in (METRICS, BEST):
        if (folder / name).exists():
            raise Failure(f"{folder}: contains {name}, but no config.yaml with a checkpoint; choose another run.dir")
