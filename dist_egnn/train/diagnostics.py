"""Diagnostics of running steps: seconds by phase, and where numbers that are not finite come from."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
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


def nonfinite(model: Module, gradients: bool = False) -> str:
    """Describes the first parameter, or the last gradient, that is not finite; empty if all are."""
    values = [(f"parameter {name}", p.detach()) for name, p in model.named_parameters()]
    if gradients:  # the last one, because the backward pass starts at the end
        parameters = reversed([*model.named_parameters()])
        values = [(f"the gradient of {name}", p.grad) for name, p in parameters if p.grad is not None]
    name, value = next(((name, value) for name, value in values if not value.isfinite().all()), ("", torch.zeros(())))
    return f"{name} is {'NaN' if value.isnan().any() else 'infinite'}" if name else ""


def nonfinite_cause(model: Module, samples: Dataset, numbers: list[int], group: Comm) -> str:
    """Describes the first value of a step that is not finite, in the order of computation; the same on all ranks.

    A collective call. numbers: the samples of the step, which are computed again one by one to name the sample.
    """
    problem = nonfinite(model)
    if group.max(float(bool(problem))):  # parameters are equal on all ranks, unless something is broken
        return problem or "a parameter of another rank is not finite"
    names = ("predicted positions", "virtual nodes' positions", "squared error")
    problems = [f"{kind} {name}" for name in names for kind in ("NaN", "infinite")]
    for number in numbers:
        graph, (trajectory, frame) = samples[number], samples.frames[number]
        with torch.no_grad():
            predicted, z = model(graph)
        values = (predicted, z, (predicted - graph.ndata["y"].to(predicted)).square().sum())
        occurs = torch.stack([test(value).any() for value in values for test in (torch.isnan, torch.isinf)])
        for problem in itertools.compress(problems, group.sum(occurs.float()).tolist()):
            return f"{problem} of sample {number} (trajectory {trajectory}, frame {frame})"
    shown = f"samples {', '.join(map(str, numbers[:8]))}{', …' * (len(numbers) > 8)}"
    return f"{nonfinite(model, gradients=True) or 'the loss is not finite'} ({shown})"


def divergence(config: Config, epoch: int, step: int | None, cause: str) -> Failure:
    """The error of a run that diverged. epoch: complete ones; step: from 1, None in validation."""
    folder, where = config.run.dir, f"epoch {epoch + 1}, {'validation' if step is None else f'step {step}'}"
    remedy = f"--resume {folder} train.lr={config.train.lr / 4:g} train.clip={config.train.clip or 1:g}"
    advice = "last.pt still holds the last good checkpoint, lower train.lr or set train.clip"
    return Failure(f"{folder}: {where}: {cause}; {advice}: distegnn train {remedy}")
