"""What rank 0 of a training writes into the run's folder: config, about, checkpoints, metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import config as configs
from ..config import Config
from ..utils import filesystem
from . import checkpoint, diagnostics, metrics, provenance
from .resume import Position


class Desk:
    """Checkpoints and metrics of a run, in an order that survives a kill between any two writes."""

    def __init__(
        self, config: Config, model: Any, optimizer: Any, position: Position, print_of: dict[str, Any]
    ) -> None:
        """print_of: the samples' fingerprint. The model, the optimiser and the position are looked at whenever it writes."""
        self.config, self.model, self.optimizer, self.position = config, model, optimizer, position
        self.folder, self.print_of = Path(config.run.dir), print_of
        self.recorder: metrics.Recorder | None = None
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether a checkpoint inside an epoch is."""
        return time.monotonic() - self.saved >= 60 * self.config.train.checkpoint_minutes

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. Failure for weights that are not finite: the last good checkpoint stays the last."""
        if bad := diagnostics.bad_parameter(self.model):
            raise diagnostics.diverged(self.config, self.position.epoch, self.position.step, bad)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),  # one for all ranks: every draw is made alike on all of them
            **vars(self.position) | {"sums": dict(self.position.sums)},
            "samples": self.print_of,
            "config": configs.to_yaml(self.config),
        }

    def save(self, keep: bool = True) -> None:
        """Write last.pt. keep: what was last.pt becomes previous.pt."""
        checkpoint.save_last(self.folder, self.state(), keep)
        self.saved = time.monotonic()

    def end_epoch(
        self, epoch: int, row: dict[str, float], memory: list[float], z: Tensor | None, improved: bool
    ) -> None:
        """Record the epoch that ended. last.pt comes last: of the epochs that it counts, all else is on disk."""
        assert self.recorder is not None
        self.recorder.add(epoch, row, memory, z)
        if improved:
            checkpoint.save(self.folder / checkpoint.BEST, self.state())
        self.save()


@contextmanager
def opened(desk: Desk, ranks: int, resumed: bool, wrong: str = "") -> Iterator[Desk]:
    """Begin, or go on with, the run's folder. wrong: why last.pt was not taken."""
    config, position = desk.config, desk.position
    if not resumed:  # before config.yaml: where that is, there is a checkpoint
        desk.save(keep=False)
    elif wrong:
        went = f"{desk.folder / checkpoint.PREVIOUS} (epoch {position.epoch}, step {position.step})"
        print(f"warning: {wrong}; going on from {went}", file=sys.stderr)
        desk.save(keep=False)  # what is damaged is not worth keeping, previous.pt is
    filesystem.write_whole(desk.folder / "config.yaml", configs.to_yaml(config).encode())
    seeds = {"train": config.train.seed, "frames": config.data.frame_seed, "partition": config.partition.seed}
    started = {"epoch": position.epoch, "step": position.step}
    provenance.add(desk.folder / "about.yaml", started | provenance.describe(ranks, config.train.device, seeds))
    desk.recorder = metrics.Recorder(desk.folder, position.epoch)
    try:
        yield desk
    finally:
        desk.recorder.close()
