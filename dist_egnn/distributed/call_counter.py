"""Count what a rank communicates in a step, in a real group or for one rank without the others.

`SimulatedRank` counts the sums and exchanges of a `Comm`; `counted_collectives` and `simulated_group` replace functions
of torch.distributed below `ProcessGroup` and count torch's collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .comm import Counts, ProcessGroup, SingleProcess, complete_gradients, dist, sent_bytes

PHASES = ("forward", "backward", "gradients")  # of a training step
COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "gather", "scatter"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "barrier", "send", "recv"),
    *("isend", "irecv", "batch_isend_irecv", "all_gather_object", "broadcast_object_list", "gather_object"),
)


@dataclass(frozen=True)
class Call:
    """A collective on ``numbers`` numbers of ``width`` bytes or, with counts of rows by rank, on rows of so many."""

    phase: str
    numbers: int
    width: int
    send_counts: tuple[int, ...] = ()
    receive_counts: tuple[int, ...] = ()
    name: str = "sum"

    @property
    def payload(self) -> int:
        """Bytes that the rank passes to the call."""
        return self.numbers * self.width * sum(self.send_counts or (1,))

    @property
    def received(self) -> int:
        """Bytes that the rank gets from the call."""
        return self.numbers * self.width * sum(self.receive_counts or (1,))

    def sent(self, size: int) -> float:
        """Bytes that the rank sends in a group of ``size``."""
        return self.payload if self.send_counts else sent_bytes(self.payload, size)


@dataclass
class CallCounter:
    """The calls of a step, in order."""

    calls: list[Call] = field(default_factory=list)
    phase: str = PHASES[0]

    def enter(self, phase: str) -> None:
        """Begin a phase. The first phase begins a new step."""
        self.phase = phase
        if phase == PHASES[0]:
            self.calls = []

    def count(self, t: Tensor, name: str = "sum", send_counts: Counts = (), receive_counts: Counts = ()) -> None:
        numbers = math.prod(t.shape[1:]) if send_counts else t.numel()
        width, send, receive = t.element_size(), tuple(send_counts), tuple(receive_counts)
        self.calls.append(Call(self.phase, numbers, width, send, receive, name))


class SimulatedRank(SingleProcess):
    """One rank of a group without the other ranks: a sum returns its operand, received rows are copies of sent rows."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.counter = CallCounter()

    def sum(self, t: Tensor) -> Tensor:
        if self.size == 1:
            return t
        self.counter.count(t)
        total = t.clone()
        if total.requires_grad:
            total.register_hook(self.counter.count)  # the backward pass of a sum is a sum
        return total

    def all_to_all(self, rows: Tensor, send_counts: Counts, receive_counts: Counts) -> Callable[[], Tensor]:
        self.counter.count(rows, "all_to_all", send_counts, receive_counts)
        copied = torch.arange(sum(receive_counts), device=rows.device) % max(len(rows), 1)
        return lambda: rows.index_select(0, copied) if len(rows) else rows.new_zeros(len(copied), *rows.shape[1:])

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], extra: Tensor | None = None) -> Tensor | None:
        tensors = [*complete_gradients(parameters), *([] if extra is None else [extra])]
        self.counter.enter("gradients")
        if self.size > 1:
            self.counter.count(torch.cat([t.reshape(-1) for t in tensors]))  # a real group copies them too
        return extra


@contextmanager
def counted_collectives() -> Iterator[CallCounter]:
    """Count every collective of torch.distributed that this process calls within the block."""
    counter = CallCounter()

    def call(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if name == "all_to_all_single":
            counter.count(args[1], name, args[3], args[2])
        else:
            tensors = (t for t in (*args, *options.values()) if isinstance(t, Tensor))
            counter.count(next(tensors, torch.empty(0)), name)
        return function(*args, **options)

    functions: dict[str, Any] = {name: partial(call, name, getattr(dist, name)) for name in COLLECTIVES}
    with mock.patch.multiple(dist, **functions):
        yield counter


@contextmanager
def simulated_group(
    rank: int, size: int, answers: Iterator[Tensor] | None = None
) -> Iterator[tuple[ProcessGroup, CallCounter]]:
    """The `ProcessGroup` of one rank without the other ranks: all code above torch.distributed runs, nothing is sent.

    answers: what each all_to_all_single receives; by default the first rows sent, then zeros.
    """

    def all_to_all_single(received: Tensor, sent: Tensor, *_: Any, **__: Any) -> Any:
        if answers is not None:
            received.copy_(next(answers))
        else:
            received[: len(sent)] = sent[: len(received)]
            received[len(sent) :] = 0
        return SimpleNamespace(wait=lambda: None)

    functions: dict[str, Any] = {"get_rank": lambda group=None: rank, "get_world_size": lambda group=None: size}
    functions["all_to_all_single"] = all_to_all_single
    with mock.patch.multiple(dist, **functions), counted_collectives() as counter:
        yield ProcessGroup(60.0), counter
