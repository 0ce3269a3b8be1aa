"""What rank 0 of a training writes into the run's folder: config.yaml, about.yaml, checkpoints, metrics."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import yaml
from torch import Tensor

from .. import __version__
from ..errors import Failure
from ..utils import filesystem
from . import callbacks, checkpoint, diagnostics, run_dir
from .events import Events

if TYPE_CHECKING:
    from .trainer import Trainer

HISTOGRAM_EVERY = 10  # epochs


@dataclass
class Shown:
    """What a validation shows: virtual nodes (n, 3) of each batch, and x, prediction, y (N, 3) of the first batch."""

    virtual: list[Tensor] = field(default_factory=list)
    nodes: tuple[Tensor, Tensor, Tensor] | None = None


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of the checkout that tracks a folder, and whether tracked files were changed; {} without git."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", "."):  # not tracked: an installed copy inside another checkout
            return {}
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def append_provenance(path: Path, trainer: Trainer) -> None:
    """Append an entry to about.yaml, a YAML list, and keep the existing bytes."""
    config, state = trainer.config, trainer.state
    packages = {name: importlib.metadata.version(name) for name in ("torch", "dgl", "numpy")}
    entry = {
        "epoch": state.epoch + 1,
        "step": state.step,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "versions": {"dist_egnn": __version__, "python": platform.python_version(), **packages},
        "git": git_state(Path(__file__).parent),
        "host": {"name": platform.node(), "system": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        "processes": trainer.comm.world.size,
        "device": config.train.device,
        "seeds": {"train": config.train.seed, "frames": config.data.frame_seed, "partition": config.partition.seed},
    }
    if trainer.init:
        entry["init"] = trainer.init
    if not entry["git"]:
        del entry["git"]
    try:
        existing = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise Failure(f"{path}: cannot be read ({error.strerror})") from error
    filesystem.write_atomically(path, existing + yaml.safe_dump([entry], sort_keys=False, width=1000).encode())


@dataclass
class RunWriter:
    """Writes checkpoints and metrics in an order that survives a kill between any two writes."""

    trainer: Trainer

    @contextmanager
    def open(self, resumed: bool, warning: str) -> Iterator[RunWriter]:
        """Start or continue the run's folder. warning: why the run resumes from previous.pt, empty if it does not."""
        config, state = self.trainer.config, self.trainer.state
        self.callbacks = callbacks.load(config.train.callbacks)
        self.folder = Path(config.run.dir)
        if warning:
            source = f"{self.folder / run_dir.PREVIOUS} (epoch {state.epoch + 1} after step {state.step})"
            print(f"warning: {warning}; resuming from {source}", file=sys.stderr)
        self.last_save = time.monotonic()
        if warning or not resumed:  # before config.yaml, so that a folder with config.yaml has a checkpoint
            self.save(keep_previous=False)
        run_dir.write_config(config)
        append_provenance(self.folder / "about.yaml", self.trainer)
        # without those of an interrupted attempt
        self.rows = checkpoint.first_rows(self.folder / run_dir.METRICS, state.epoch)
        self.events = Events(self.folder / "tensorboard", config, self.trainer.steps_done())
        try:
            yield self
        finally:
            self.events.close()

    def save(self, name: str = run_dir.LAST, keep_previous: bool = True) -> None:
        """Write a checkpoint; keep_previous: the present file becomes previous.pt.

        Raises Failure for weights that are not finite, so that last.pt still holds the last good checkpoint.
        """
        trainer, path = self.trainer, self.folder / name
        if problem := diagnostics.nonfinite(trainer.model):
            raise diagnostics.divergence(trainer.config, trainer.state.epoch, trainer.state.step, problem)
        if keep_previous and path.exists():  # until the new file is written, a resume reads previous.pt
            os.replace(path, self.folder / run_dir.PREVIOUS)
        checkpoint.save(path, checkpoint.of_training(trainer))
        self.last_save = time.monotonic()

    def end_epoch(self, row: dict[str, float], gb: list[float], shown: Shown, improved: bool) -> None:
        """Record the epoch that is complete. gb: peak memory of each rank; shown: of its validation."""
        self.rows.append({"epoch": self.trainer.state.epoch, **row})
        content = pd.DataFrame(self.rows).to_csv(index=False).encode()
        filesystem.write_atomically(self.folder / run_dir.METRICS, content)
        done = self.trainer.steps_done()
        if shown.nodes:
            self.events.pictures(done, *shown.nodes)
        histogram = shown.virtual and (self.trainer.state.epoch - 1) % HISTOGRAM_EVERY == 0
        self.events.epoch(done, self.rows[-1], gb, torch.cat(shown.virtual) if histogram else None)
        if improved:
            self.save(run_dir.BEST, keep_previous=False)
        self.save()  # last: metrics.csv and best.pt include the epochs of last.pt
