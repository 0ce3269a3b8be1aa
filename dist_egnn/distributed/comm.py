"""All collectives of the package. Layers call the methods of `Comm` and never ask how many processes there are.

A training step of a model with virtual nodes makes one all-reduce per layer in the forward pass, one per layer in the
backward pass, and one for all gradients. With halos, each layer also sends rows with `all_to_all` (data/halo.py).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import Failure
from ..utils import devices

DEVICE_BACKEND = "nccl"  # moves tensors between devices of their own, without the hosts' memory
Counts = Sequence[int]  # numbers of rows, one per rank


class Comm:
    """Communication of one rank with the ``size`` ranks that share its graphs; this base class is a group of one."""

    def __init__(self, rank: int = 0, size: int = 1, world: Comm | None = None) -> None:
        self.rank, self.size = rank, size
        self.world = world or self  # all processes of the run, more than ``size`` if replica groups train one model

    def split(self, groups: int) -> Comm:
        """This rank's group after a split into ``groups`` groups of consecutive ranks; its ``world`` is this Comm."""
        assert groups == 1
        return self

    @property
    def backend(self) -> str:
        """What sends tensors of this rank's device: gloo, nccl, or nothing in a group of one."""
        return ""

    def use_device(self, device: torch.device, backend: str) -> None:
        """Choose how tensors of this rank's device are sent, see train.backend. Collective; call it before `split`."""

    def sum(self, t: Tensor) -> Tensor:
        """All-reduce: Σ_p t_p on every rank, of any shape, added in the order of ranks. Differentiable."""
        return t

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], extra: Tensor | None = None) -> Tensor | None:
        """Sum each gradient (missing: zeros) and ``extra`` (n,) over the ranks in one all-reduce; returns the sum of extra."""
        complete_gradients(parameters)
        return extra

    def max(self, value: float) -> float:
        """The largest value of all ranks."""
        return value

    def broadcast(self, content: bytes) -> bytes:
        """The content of rank 0, on every rank; the argument of other ranks is ignored."""
        return content

    def all_to_all(self, rows: Tensor, send_counts: Counts, receive_counts: Counts) -> Callable[[], Tensor]:
        """Start to send rows (Σ send_counts, …): the first send_counts[0] to rank 0, and so on. Not differentiable.

        Returns a function that waits for the received rows (Σ receive_counts, …), in the order of their ranks.
        """
        return lambda: rows


class SingleProcess(Comm):
    """A group of one rank: every sum is its operand."""


def complete_gradients(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients; missing ones become zeros, so that the optimizer treats unused parameters alike on any P."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients


_collective_seconds = 0.0


def collective_seconds() -> float:
    """Seconds that this process has spent in collectives, including the wait for other ranks."""
    return _collective_seconds


@contextmanager
def _timed() -> Iterator[None]:
    """Add the block's seconds to those in collectives. Raises ConnectionError if another process is gone."""
    global _collective_seconds
    started = time.perf_counter()
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's
        raise ConnectionError(f"another process is lost ({str(error).splitlines()[0][-100:]})") from error
    _collective_seconds += time.perf_counter() - started


ONE_ROUND_BYTES = 1 << 18  # up to this size a process sends everything in one round


def message_rounds(nbytes: int, size: int) -> int:
    """Rounds of messages of an all-reduce of ``nbytes`` among ``size`` processes, see `_ordered_sum`."""
    return 1 if size == 2 or nbytes * (size - 1) <= ONE_ROUND_BYTES else 2


def sent_bytes(nbytes: int, size: int) -> float:
    """Bytes that each process sends in an all-reduce of ``nbytes``."""
    return nbytes * (size - 1) * (1.0 if message_rounds(nbytes, size) == 1 else 2 / size)


def _ordered_sum(t: Tensor, comm: ProcessGroup) -> Tensor:
    """Σ_p t_p, added in the order of ranks, so that every rank gets the same bits.

    gloo's ring all-reduce waits for 2(P − 1) messages in sequence. Here all ranks send to all others at once: a small
    tensor completely, in one round; a large one in two rounds, a reduce-scatter and an all-gather.
    """
    flat, group = comm.route(t.detach().reshape(-1))
    n, size = len(flat), comm.size
    one_round = message_rounds(n * flat.element_size(), size) == 1
    rows = flat.expand(size, n) if one_round else torch.nn.functional.pad(flat, (0, -n % size)).view(size, -1)
    received = _transpose(rows, group)
    total = sum(received[1:], received[0])  # torch.sum adds in an order that depends on the processor
    if not one_round:
        total = _transpose(total.expand(size, len(total)), group).view(-1)[:n]
    return total.to(t.device).view(t.shape)


def _transpose(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Send row r of (P, n) to rank r; returns the rows received (P, n), this rank's own included."""
    rank, splits = dist.get_rank(group), [1] * len(rows)
    splits[rank] = 0
    sent, own = torch.cat([rows[:rank], rows[rank + 1 :]]), rows[rank : rank + 1]
    received = torch.empty_like(sent)
    with _timed():
        dist.all_to_all_single(received, sent, splits, splits, group=group)
    return torch.cat([received[:rank], own, received[rank:]])


class _Sum(torch.autograd.Function):
    """y = Σ_p x_p. The loss of every rank depends on y, so ∂L/∂x_p = Σ_r ∂L_r/∂y: the backward pass is a sum too."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, comm: ProcessGroup) -> Tensor:
        ctx.comm = comm
        return _ordered_sum(t, comm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ordered_sum(grad, ctx.comm), None


class ProcessGroup(Comm):
    """The processes of a torch process group, by default all of them."""

    def __init__(
        self,
        timeout_s: float,
        group: dist.ProcessGroup | None = None,
        world: Comm | None = None,
        device_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), world)
        self._timeout = timedelta(seconds=timeout_s)
        self._group, self._device_group = group, device_group

    @property
    def backend(self) -> str:
        return "gloo" if self._device_group is None else DEVICE_BACKEND

    def use_device(self, device: torch.device, backend: str) -> None:
        """Send tensors of the devices by NCCL (nccl; auto: if each rank has its own), else by gloo through host memory.

        Raises Failure for nccl if ranks share a device.
        """
        self._device_group = None
        if backend == "gloo":
            return
        used = self._gather(devices.number(device)).tolist()
        shared = [rank for rank, number in enumerate(used) if not number or used.count(number) > 1]
        if not shared and dist.is_backend_available(DEVICE_BACKEND):
            self._device_group = dist.new_group(timeout=self._timeout, backend=DEVICE_BACKEND)
        elif backend == "nccl":
            why = f"processes {', '.join(map(str, shared))} share devices" if shared else "this torch has no NCCL"
            raise Failure(
                f"train.backend=nccl: {why}; start one process for each CUDA device, or use train.backend=auto"
            )

    def route(self, t: Tensor) -> tuple[Tensor, dist.ProcessGroup | None]:
        """The tensor where it can be sent, in host memory if necessary, and the group that sends it."""
        if self._device_group is None or t.device.type == "cpu":
            return t.cpu(), self._group
        return t, self._device_group

    def split(self, groups: int) -> Comm:
        assert self._group is None
        if groups == 1:
            return self
        if groups == self.size:
            return SingleProcess(world=self)
        # a DeviceMesh would also make groups across these and ignore our timeout
        size, device_group = self.size // groups, None
        own, _ = dist.new_subgroups(size, timeout=self._timeout)
        if self._device_group is not None:
            device_group, _ = dist.new_subgroups(size, timeout=self._timeout, backend=DEVICE_BACKEND)
        return ProcessGroup(self._timeout.total_seconds(), own, self, device_group)

    def sum(self, t: Tensor) -> Tensor:
        return _Sum.apply(t, self)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], extra: Tensor | None = None) -> Tensor | None:
        gradients = complete_gradients(parameters)
        tensors = [*gradients, *([] if extra is None else [extra.to(gradients[0])])]
        bucket = torch.cat([t.reshape(-1) for t in tensors])
        totals = _ordered_sum(bucket, self).split([t.numel() for t in tensors])
        for gradient, total in zip(gradients, totals, strict=False):
            gradient.copy_(total.view_as(gradient))
        return None if extra is None else totals[-1]

    def _gather(self, value: float) -> Tensor:
        own = torch.full((self.size, 1), value, dtype=torch.float64, device="cpu")
        return _transpose(own, self._group).flatten()

    def max(self, value: float) -> float:
        return float(self._gather(value).max())

    def broadcast(self, content: bytes) -> bytes:
        size = torch.tensor(len(content), device="cpu")
        with _timed():
            dist.broadcast(size, group=self._group, group_src=0)
        t = torch.empty(int(size), dtype=torch.uint8, device="cpu")
        if self.rank == 0 and content:
            t.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        with _timed():
            dist.broadcast(t, group=self._group, group_src=0)
        return t.numpy().tobytes()

    def all_to_all(self, rows: Tensor, send_counts: Counts, receive_counts: Counts) -> Callable[[], Tensor]:
        sent, group = self.route(rows.contiguous())
        received = sent.new_empty(sum(receive_counts), *rows.shape[1:])
        counts = list(receive_counts), list(send_counts)
        with _timed():
            work = dist.all_to_all_single(received, sent, *counts, group=group, async_op=True)

        def wait() -> Tensor:
            with _timed():
                work.wait()
            assert len(sent) == sum(send_counts)  # keeps ``sent`` alive until here
            return received.to(rows.device)

        return wait


def join_local(rank: int, size: int, rendezvous: Path, timeout_s: float) -> Comm:
    """Join ``size`` processes of this machine. rendezvous: the path of a file that does not exist yet."""
    if size == 1:
        return SingleProcess()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size, timeout=timeout)
    return ProcessGroup(timeout_s)


def join_hosts(rank: int, size: int, address: str, port: int, interface: str, timeout_s: float) -> Comm:
    """Join ``size`` processes of several hosts through rank 0, which listens on ``address`` and ``port`` only.

    interface: name of this host's network interface to the others. Raises Failure if they do not connect in time.
    """
    if size == 1:
        return SingleProcess()
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    names = [name for _, name in socket.if_nameindex()]
    if interface not in names:
        raise Failure(f"{interface}: no network interface of this host; name one of {', '.join(names)}")
    try:  # a TCPStore that opens its own socket listens on every interface
        listener = None if rank else socket.create_server((address, port), backlog=size).detach()
    except OSError as error:
        raise Failure(f"{address}:{port}: rank 0 cannot listen ({error.strerror}); name another port") from error
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(address, port, size, rank == 0, timeout, master_listen_fd=listener)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise Failure(f"{address}:{port}: rank {rank} cannot connect to the other {size - 1} ({reason})") from error
    return ProcessGroup(timeout_s)


def leave_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
