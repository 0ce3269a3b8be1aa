"""The learning rate of a step, from where the run stands alone: nothing to lose at a resume."""

from __future__ import annotations

import math

from ..config import Train


def rate(settings: Train, epoch: int, done: float, scale: float) -> float:
    """The rate of a step that ends when the share ``done`` of an epoch is done. scale: how far plateaus have lowered it.

    It rises linearly over the first `train.warmup` epochs, step by step. Cosine then falls to zero at `train.epochs`, epoch
    by epoch; plateau lowers it as `lowered` says; constant stays.
    """
    found = settings.lr * scale
    if epoch + done < settings.warmup:
        return found * (epoch + done) / settings.warmup
    if settings.schedule == "cosine":
        passed = max(epoch - settings.warmup, 0.0) / (settings.epochs - settings.warmup)
        found *= 0.5 * (1 + math.cos(math.pi * passed))
    return found


def lowered(settings: Train, waited: int, scale: float) -> float:
    """The scale after an epoch: multiplied by `train.plateau_factor` each time `train.plateau_epochs` epochs brought no
    better validation MSE. waited: epochs since the best one."""
    stuck = settings.schedule == "plateau" and waited and waited % settings.plateau_epochs == 0
    return scale * settings.plateau_factor if stuck else scale
