"""Count what a rank communicates in a step, in a real group or for one rank without the others.

`SimulatedRank` replaces the group: its calls are the sums and exchanges of a `Comm`. `simulated_group` and
`counted_collectives` replace torch.distributed below `ProcessGroup`: their calls are torch's collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .comm import ProcessGroup, SingleProcess, dist, sent_bytes

PHASES = ("forward", "backward", "gradients")  # of a training step
COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "gather", "scatter"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "barrier", "send", "recv"),
    *("isend", "irecv", "batch_isend_irecv", "all_gather_object", "broadcast_object_list", "gather_object"),
)


@dataclass(frozen=True)
class Call:
    """One call: ``numbers`` numbers of ``width`` bytes, or, if there are counts, rows of so many numbers.

    send_counts, receive_counts: rows to and from each rank; name: the collective.
    """

    phase: str
    numbers: int
    width: int
    send_counts: tuple[int, ...] = ()
    receive_counts: tuple[int, ...] = ()
    name: str = "sum"

    @property
    def payload(self) -> int:
        """Bytes that the rank passes to the call."""
        return self.numbers * self.width * (sum(self.send_counts) if self.send_counts else 1)

    @property
    def received(self) -> int:
        """Bytes that the rank gets from the call."""
        return self.numbers * self.width * (sum(self.receive_counts) if self.receive_counts else 1)

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

    def count(self, t: Tensor, name: str = "sum") -> None:
        self.calls.append(Call(self.phase, t.numel(), t.element_size(), name=name))

    def count_rows(
        self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], name: str = "all_to_all"
    ) -> None:
        counts = tuple(send_counts), tuple(receive_counts)
        self.calls.append(Call(self.phase, math.prod(rows.shape[1:]), rows.element_size(), *counts, name))


class _CountedIdentity(torch.autograd.Function):
    """The operand itself. Counts it in the forward pass and its gradient in the backward pass, as a sum would."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, count: Callable[[Tensor], None]) -> Tensor:
        ctx.count = count
        count(t)
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.count(grad)
        return grad, None


class SimulatedRank(SingleProcess):
    """One rank of a group without the other ranks: a sum returns its operand, received rows are copies of sent rows."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.counter = rank, size, CallCounter()

    def _count(self, t: Tensor) -> None:
        if self.size > 1:
            self.counter.count(t)

    def sum(self, t: Tensor) -> Tensor:
        return _CountedIdentity.apply(t, self._count)

    def all_to_all(
        self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Callable[[], Tensor]:
        self.counter.count_rows(rows, send_counts, receive_counts)
        copied = torch.arange(sum(receive_counts), device=rows.device) % max(len(rows), 1)
        return lambda: rows.index_select(0, copied) if len(rows) else rows.new_zeros(len(copied), *rows.shape[1:])

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], extra: Tensor | None = None) -> Tensor | None:
        parameters = list(parameters)
        super().sum_gradients(parameters, extra)
        gradients = [p.grad.reshape(-1) for p in parameters if p.grad is not None]
        self.counter.enter("gradients")
        self._count(torch.cat([*gradients, *([] if extra is None else [extra])]))  # a real group copies them too
        return extra


@contextmanager
def _replaced(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Functions of torch.distributed, replaced within the block."""
    originals = {name: getattr(dist, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(dist, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


@contextmanager
def counted_collectives() -> Iterator[CallCounter]:
    """Count every collective of torch.distributed that this process calls within the block."""
    counter = CallCounter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tensors = [t for t in (*args, *options.values()) if isinstance(t, Tensor)]
            if name == "all_to_all_single":
                counter.count_rows(args[1], args[3], args[2], name)
            else:
                counter.count(tensors[0] if tensors else torch.empty(0), name)
            return function(*args, **options)

        return call

    with _replaced({name: counted(name, getattr(dist, name)) for name in COLLECTIVES}):
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

    functions = {"get_rank": lambda group=None: rank, "get_world_size": lambda group=None: size}
    with _replaced({**functions, "all_to_all_single": all_to_all_single}), counted_collectives() as counter:
        yield ProcessGroup(60.0), counter
