"""What is looked at while steps run: seconds by phase, and numbers that are not finite."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..config import Config
from ..data.dataset import Dataset
from ..distributed import comm
from ..distributed.comm import Comm
from ..errors import Failure
from ..utils import devices

PHASES = ("data_s", "forward_s", "communication_s", "backward_s")


@contextmanager
def phase(name: str, sums: dict[str, float], device: torch.device) -> Iterator[None]:
    """Add the block's seconds to sums[name], but those in collectives to communication_s."""
    started, talked = time.perf_counter(), comm.seconds()
    yield
    devices.wait(device)
    talked = comm.seconds() - talked
    sums["communication_s"] += talked
    sums[name] += time.perf_counter() - started - talked


def _kind(value: Tensor) -> str:
    return "NaN" if bool(value.isnan().any()) else "infinite" if not bool(value.isfinite().all()) else ""


def bad_parameter(model: torch.nn.Module) -> str:
    """The first parameter that is not finite, and how; "" if there is none."""
    found = ((name, _kind(p.detach())) for name, p in model.named_parameters())
    return next((f"parameter {name} is {kind}" for name, kind in found if kind), "")


def culprit(model: torch.nn.Module, samples: Dataset, numbers: list[int], group: Comm) -> str:
    """What is not finite first, in the order in which a step computes; every rank asks and gets the same answer.

    numbers: the samples of the step. They are run again one by one, so that the guilty one has a name.
    """
    bad = bad_parameter(model)
    if group.max(float(bool(bad))):  # parameters are alike on all ranks, unless something is broken
        return bad or "a parameter of another rank is not finite"
    names = ("the predicted positions", "the virtual nodes' positions", "the squared error")
    for number in numbers:
        graph = samples[number]
        with torch.no_grad():
            predicted, z = model(graph)
        error = (predicted - graph.ndata["y"].to(predicted)).square().sum()
        kinds = [_kind(value) for value in (predicted, z, error)]
        # the earliest that any rank has; 2k and 2k + 1 tell NaN from infinite
        own = min((2 * k + (kind != "NaN") for k, kind in enumerate(kinds) if kind), default=9)
        if (first := -int(group.max(-own))) < 9:
            trajectory, frame = samples.frames[number]
            verb = "is" if first // 2 == 2 else "are"
            kind = "infinite" if first % 2 else "NaN"
            return f"{names[first // 2]} of sample {number} (trajectory {trajectory}, frame {frame}) {verb} {kind}"
    shown = f"samples {', '.join(map(str, numbers[:8]))}{', …' * (len(numbers) > 8)}"
    gradients = ((name, _kind(p.grad)) for name, p in model.named_parameters() if p.grad is not None)
    last = [(name, kind) for name, kind in gradients if kind][-1:]  # the backward pass comes from the end
    return f"the gradient of {last[0][0]} is {last[0][1]} ({shown})" if last else f"the loss is not finite ({shown})"


def diverged(config: Config, epoch: int, step: int | None, what: str) -> Failure:
    """The line that ends such a run."""
    where = f"epoch {epoch}, {'validation' if step is None else f'step {step}'}"
    folder = config.run.dir
    return Failure(
        f"{folder}: {where}: {what}; the last good checkpoint is kept, lower train.lr or set train.clip: "
        f"distegnn train --resume {folder} train.lr={config.train.lr / 4:g} train.clip={config.train.clip or 1:g}"
    )
