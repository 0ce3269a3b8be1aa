"""Diagnostics of running steps: seconds by phase, and where numbers that are not finite come from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module

from ..config import Config
from ..data.dataset import Dataset
from ..distributed import comm
from ..distributed.comm import Comm
from ..errors import Failure
from ..utils import devices

PHASES = ("data_s", "forward_s", "communication_s", "backward_s")


@contextmanager
def phase(name: str, sums: dict[str, float], device: torch.device) -> Iterator[None]:
    """Add the block's seconds to sums[name], except those in collectives, which go to communication_s."""
    started, communication = time.perf_counter(), comm.collective_seconds()
    yield
    devices.synchronize(device)
    communication = comm.collective_seconds() - communication
    sums["communication_s"] += communication
    sums[name] += time.perf_counter() - started - communication


def _kind(value: Tensor) -> str:
    return "NaN" if bool(value.isnan().any()) else "infinite" if not bool(value.isfinite().all()) else ""


def nonfinite_parameter(model: Module) -> str:
    """Describes the first parameter that is not finite; empty if all are."""
    kinds = ((name, _kind(parameter.detach())) for name, parameter in model.named_parameters())
    return next((f"parameter {name} is {kind}" for name, kind in kinds if kind), "")


def nonfinite_cause(model: Module, samples: Dataset, numbers: list[int], group: Comm) -> str:
    """Describes the first value of a step that is not finite, in the order of computation; the same on all ranks.

    A collective call. numbers: the samples of the step, which are computed again one by one to name the sample.
    """
    problem = nonfinite_parameter(model)
    if group.max(float(bool(problem))):  # parameters are equal on all ranks, unless something is broken
        return problem or "a parameter of another rank is not finite"
    names = ("the predicted positions", "the virtual nodes' positions", "the squared error")
    for number in numbers:
        graph = samples[number]
        with torch.no_grad():
            predicted, z = model(graph)
        error = (predicted - graph.ndata["y"].to(predicted)).square().sum()
        kinds = [_kind(value) for value in (predicted, z, error)]
        # the first value on any rank, encoded as 2k for NaN and 2k + 1 for infinite
        own = min((2 * k + (kind != "NaN") for k, kind in enumerate(kinds) if kind), default=9)
        if (first := -int(group.max(-own))) < 9:
            trajectory, frame = samples.frames[number]
            verb = "is" if first // 2 == 2 else "are"
            kind = "infinite" if first % 2 else "NaN"
            return f"{names[first // 2]} of sample {number} (trajectory {trajectory}, frame {frame}) {verb} {kind}"
    shown = f"samples {', '.join(map(str, numbers[:8]))}{', …' * (len(numbers) > 8)}"
    gradients = ((name, _kind(p.grad)) for name, p in model.named_parameters() if p.grad is not None)
    last = [(name, kind) for name, kind in gradients if kind][-1:]  # the backward pass starts at the end
    return f"the gradient of {last[0][0]} is {last[0][1]} ({shown})" if last else f"the loss is not finite ({shown})"


def divergence(config: Config, epoch: int, step: int | None, cause: str) -> Failure:
    """The error of a run that diverged. step: None in validation."""
    where = f"epoch {epoch}, {'validation' if step is None else f'step {step}'}"
    folder = config.run.dir
    return Failure(
        f"{folder}: {where}: {cause}; last.pt still holds the last good checkpoint, lower train.lr or set train.clip: "
        f"distegnn train --resume {folder} train.lr={config.train.lr / 4:g} train.clip={config.train.clip or 1:g}"
    )
