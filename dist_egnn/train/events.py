"""TensorBoard events of a run: curves by optimiser step and by epoch, pictures of validations, hyperparameters.

All tags count optimiser steps from 1, so that curves by step and by epoch share an axis; an epoch's point is at its last
step. Groups of tags: loss, time, memory, model, validation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..config import Config, keys
from ..errors import Failure

GROUPS = {"train_loss": "loss/train", "train_mse": "loss/train_mse", "valid_mse": "loss/valid_mse"}
GROUPS["valid_rollout_mse"] = "loss/valid_rollout_mse"
GROUPS |= {"lr": "model/lr", "grad_norm": "model/grad_norm", "peak_gb": "memory/peak_gb"}  # others are seconds
ABOUT_LOSS = (
    "loss/train and loss/train_step are MSE + loss.mmd · MMD. The MMD is computed without its constant term, the mean "
    "kernel among targets, which has no gradient: the loss can be negative. loss/train_mse and loss/valid_mse cannot."
)
SIDE, LEFT, TOP = 300, 60, 24  # of a picture's axes and of their margins, in pixels


class Events:
    """Writes events from step ``done`` on; later ones of an interrupted attempt are dropped by TensorBoard."""

    def __init__(self, folder: Path, config: Config, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.config = config
        self.writer: Any = SummaryWriter(str(folder), purge_step=done + 1)
        with self.errors():
            self.writer.add_text("loss/about", ABOUT_LOSS, 0)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise Failure for a disk that cannot be written."""
        try:
            yield
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); free disk space, then resume the run"
            raise Failure(f"{self.writer.log_dir}: {reason}") from error

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """Record one optimiser step: train_loss, train_mse, grad_norm, lr."""
        with self.errors():
            for name, value in values.items():
                self.writer.add_scalar(f"{GROUPS[name]}_step", value, number)

    def epoch(self, number: int, row: Mapping[str, float], gb: list[float], z: Tensor | None) -> None:
        """Record an epoch at its last step. gb: peak memory of each rank; z (n, 3): virtual nodes in validation."""
        tags = {GROUPS.get(name, f"time/{name}"): value for name, value in row.items() if not math.isnan(value)}
        with self.errors():
            for tag, value in {**tags, **{f"memory/rank{rank}_gb": peak for rank, peak in enumerate(gb)}}.items():
                self.writer.add_scalar(tag, value, number)
            for axis, values in zip("xyz", z.T if z is not None and len(z) else (), strict=False):
                self.writer.add_histogram(f"model/virtual_nodes_{axis}", values, number)
            self.writer.flush()

    def pictures(self, number: int, x: Tensor, predicted: Tensor, y: Tensor) -> None:
        """Two pictures of a validation, of this rank's nodes of the first batch (N, 3): displacement and error."""
        true, moved, error = ((a - b).norm(dim=1).cpu().numpy() for a, b in ((y, x), (predicted, x), (predicted, y)))
        with suppress(ImportError), self.errors():  # Pillow comes with the extra viz
            for name, values, title in (
                ("displacement", moved, "predicted over true displacement"),
                ("error", error, "error over true displacement"),
            ):
                picture = density(true, values, title)
                self.writer.add_image(f"validation/{name}", picture, number, dataformats="HWC")

    def finish(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record the settings as hyperparameters, with the final errors."""
        from torch.utils.tensorboard.summary import hparams

        values = {
            key: getattr(getattr(self.config, section), name) for key in keys() for section, name in [key.split(".")]
        }
        settings = {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}
        final = {f"hparam/{name}": value for name, value in metrics.items()}
        with self.errors():
            for summary in hparams(settings, final):
                self.writer.file_writer.add_summary(summary, number)
            for tag, value in final.items():
                self.writer.add_scalar(tag, value, number)

    def close(self) -> None:
        with suppress(OSError):  # of a full disk, which `epoch` has reported
            self.writer.close()


def density(across: np.ndarray, up: np.ndarray, title: str) -> np.ndarray:
    """A picture (H, W, 3) of points (N,), both axes from 0 to the largest value: darker where there are more.

    A line marks equal values. Drawn without matplotlib, whose import would cost more than a small run.
    """
    from PIL import Image, ImageDraw

    end = float(max(across.max(), up.max())) or 1.0
    counts, _, _ = np.histogram2d(end - up, across, SIDE // 2, [[0, end], [0, end]])
    shade = np.log1p(counts) / max(np.log1p(counts.max()), 1e-30)
    cells = np.where(counts[..., None] > 0, np.array([190, 215, 240]) * (1 - 0.9 * shade[..., None]), 255)
    image = Image.new("RGB", (SIDE + LEFT + 20, SIDE + 2 * TOP), "white")
    image.paste(Image.fromarray(cells.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST), (LEFT, TOP))
    draw, bottom = ImageDraw.Draw(image), TOP + SIDE
    draw.rectangle((LEFT, TOP, LEFT + SIDE, bottom), outline="black")
    draw.line((LEFT, bottom, LEFT + SIDE, TOP), fill="gray")
    draw.text((LEFT + SIDE / 2, TOP / 2), title, fill="black", anchor="mm")
    for text, place, anchor in ((f"{end:.3g}", (LEFT - 4, TOP), "rm"), ("0", (LEFT - 4, bottom), "rm")):
        draw.text(place, text, fill="black", anchor=anchor)
    draw.text((LEFT + SIDE, bottom + 4), f"{end:.3g}", fill="black", anchor="ra")
    return np.asarray(image)
