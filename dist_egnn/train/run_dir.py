"""The files of a run's folder, and what a folder must contain before a command uses it. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Failure

if TYPE_CHECKING:
    from ..config import Config

CONFIG, METRICS = "config.yaml", "metrics.csv"
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


def can_resume(folder: Path) -> bool:
    """Whether the folder holds a run with a checkpoint to resume from."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (LAST, PREVIOUS))


def check_is_run(folder: Path) -> None:
    """Raise Failure unless the folder is a run."""
    if not (folder / CONFIG).is_file():
        raise Failure(f"{folder}: not a run (no config.yaml); create one with `distegnn train`")


def check_new_run(config: Config) -> None:
    """Raise Failure if a new run in run.dir would overwrite files of another one."""
    folder = Path(config.run.dir)
    if can_resume(folder):
        remedy = f"choose another run.dir, or resume it: distegnn train --resume {folder}"
        raise Failure(f"{folder}: holds a run already; {remedy}")
    for name in (METRICS, BEST):
        if (folder / name).exists():
            raise Failure(f"{folder}: contains {name}, but no config.yaml with a checkpoint; choose another run.dir")
