"""The learning rate of a step, computed from the state of the run alone, so that a resume needs no scheduler."""

from __future__ import annotations

import math

from ..config import Train


def learning_rate(settings: Train, epoch: int, fraction: float, scale: float) -> float:
    """The rate of a step that ends at this fraction of the epoch. scale: the factor that plateaus have led to.

    It rises linearly over the first `train.warmup` epochs, step by step. Then "cosine" falls to zero at `train.epochs`,
    epoch by epoch; "plateau" falls as `plateau_scale` defines; "constant" stays.
    """
    rate = settings.lr * scale
    if epoch + fraction < settings.warmup:
        return rate * (epoch + fraction) / settings.warmup
    if settings.schedule == "cosine":
        elapsed = max(epoch - settings.warmup, 0.0) / (settings.epochs - settings.warmup)
        rate *= 0.5 * (1 + math.cos(math.pi * elapsed))
    return rate


def plateau_scale(settings: Train, waited: int, scale: float) -> float:
    """The scale after an epoch: multiplied by `train.plateau_factor` after every `train.plateau_epochs` epochs without a
    better validation MSE. waited: epochs since the best one."""
    reduce = settings.schedule == "plateau" and waited and waited % settings.plateau_epochs == 0
    return scale * settings.plateau_factor if reduce else scale
