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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from .. import __version__
from .. import config as configs
from ..config import Config
from ..errors import Failure
from ..utils import filesystem
from . import checkpoint, diagnostics, run_dir
from .state import TrainingState


def rows_before(path: Path, epoch: int) -> list[dict[str, Any]]:
    """The rows of a metrics.csv before an epoch, exactly as written. Raises Failure if the file is damaged."""
    if not path.is_file():
        return []
    try:
        table = pd.read_csv(path, float_precision="round_trip")
        return table[table["epoch"] < epoch].to_dict("records")
    except (ValueError, KeyError) as error:  # of pandas, for text that is no such table
        raise Failure(f"{path}: not the metrics of a run ({str(error).splitlines()[0]}); copy it again") from error


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of the checkout that tracks a folder, and whether tracked files were changed; {} without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # read only
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
        return result.stdout.strip()

    try:
        if not git("ls-files", "."):  # not tracked: an installed copy inside another checkout
            return {}
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def append_provenance(path: Path, config: Config, state: TrainingState, processes: int) -> None:
    """Append an entry to about.yaml, a YAML list, and keep the existing bytes."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "dgl", "numpy")}
    entry = {
        "epoch": state.epoch,
        "step": state.step,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "versions": {"dist_egnn": __version__, "python": platform.python_version(), **packages},
        "git": git_state(Path(__file__).parent),
        "host": {"name": platform.node(), "system": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        "processes": processes,
        "device": config.train.device,
        "seeds": {"train": config.train.seed, "frames": config.data.frame_seed, "partition": config.partition.seed},
    }
    if not entry["git"]:
        del entry["git"]
    try:
        existing = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise Failure(f"{path}: cannot be read ({error.strerror})") from error
    filesystem.write_atomically(path, existing + yaml.safe_dump([entry], sort_keys=False, width=1000).encode())


@dataclass
class RunWriter:
    """Writes checkpoints and metrics in an order that survives a kill between any two writes.

    samples: fingerprint of the data. Model, optimizer and state are read at each checkpoint.
    """

    config: Config
    model: Module
    optimizer: Optimizer
    state: TrainingState
    samples: dict[str, Any]

    @contextmanager
    def open(self, ranks: int, resumed: bool, warning: str) -> Iterator[RunWriter]:
        """Start or continue the run's folder. warning: why the run resumes from previous.pt, empty if it does not."""
        from torch.utils.tensorboard import SummaryWriter

        state, self.folder = self.state, Path(self.config.run.dir)
        if warning:
            source = f"{self.folder / run_dir.PREVIOUS} (epoch {state.epoch}, step {state.step})"
            print(f"warning: {warning}; resuming from {source}", file=sys.stderr)
        self.last_save = time.monotonic()
        if warning or not resumed:  # before config.yaml, so that a folder with config.yaml has a checkpoint
            self.save(keep_previous=False)
        filesystem.write_atomically(self.folder / run_dir.CONFIG, configs.to_yaml(self.config).encode())
        append_provenance(self.folder / "about.yaml", self.config, state, ranks)
        self.rows = rows_before(self.folder / run_dir.METRICS, state.epoch)  # drops those of an interrupted attempt
        self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=state.epoch)
        try:
            yield self
        finally:
            with suppress(OSError):  # of a full disk, which `end_epoch` has reported
                self.events.close()

    def checkpoint_due(self) -> bool:
        """Whether `train.checkpoint_minutes` have passed since the last checkpoint."""
        return time.monotonic() - self.last_save >= 60 * self.config.train.checkpoint_minutes

    def _checkpoint(self) -> checkpoint.Checkpoint:
        """Raises Failure for weights that are not finite, so that last.pt still holds the last good checkpoint."""
        if problem := diagnostics.nonfinite_parameter(self.model):
            raise diagnostics.divergence(self.config, self.state.epoch, self.state.step, problem)
        return checkpoint.of_training(self.model, self.config, self.optimizer, self.state, self.samples)

    def save(self, keep_previous: bool = True) -> None:
        """Write last.pt. keep_previous: the present last.pt becomes previous.pt."""
        content, last = self._checkpoint(), self.folder / run_dir.LAST
        if keep_previous and last.exists():  # until `last` is written, a resume reads previous.pt
            os.replace(last, self.folder / run_dir.PREVIOUS)
        checkpoint.save(last, content)
        self.last_save = time.monotonic()

    def end_epoch(
        self, epoch: int, row: dict[str, float], memory: list[float], z: Tensor | None, improved: bool
    ) -> None:
        """Record an epoch. memory: peak of each rank in GB; z (n, 3): positions of virtual nodes.

        last.pt is written last, after metrics.csv and best.pt, which include its epochs.
        """
        self.rows.append({"epoch": epoch, **row})
        content = pd.DataFrame(self.rows).to_csv(index=False).encode()
        filesystem.write_atomically(self.folder / run_dir.METRICS, content)
        try:
            for name, value in {**row, **{f"memory_gb/rank{rank}": gb for rank, gb in enumerate(memory)}}.items():
                self.events.add_scalar(name, value, epoch)
            for axis, values in zip("xyz", z.T if z is not None and len(z) else (), strict=False):
                self.events.add_histogram(f"virtual_nodes/{axis}", values, epoch)
            self.events.flush()
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); free disk space, then resume the run"
            raise Failure(f"{self.events.log_dir}: {reason}") from error
        if improved:
            checkpoint.save(self.folder / run_dir.BEST, self._checkpoint())
        self.save()
