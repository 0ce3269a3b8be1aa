"""torch's Adam without the compiler that torch.optim loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """What a decorator of torch wraps; the method itself where there is none."""
    return getattr(method, "__wrapped__", method)


class Adam(torch.optim.Adam):
    """The same numbers and the same state as `torch.optim.Adam`'s.

    torch hides these methods from torch.compile, and imports torch._dynamo to do so: a second and 0.07 GB of every process,
    for nothing, since nothing here is compiled.
    """

    add_param_group = _plain(Optimizer.add_param_group)
    zero_grad = _plain(Optimizer.zero_grad)
    state_dict = _plain(Optimizer.state_dict)
    load_state_dict = _plain(Optimizer.load_state_dict)
    step = torch.no_grad()(_plain(torch.optim.Adam.step))
