"""Device names: their syntax, their availability, and the device that a process uses."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from ..errors import Failure

if TYPE_CHECKING:
    import torch


def check_name(name: str, key: str, *extra: str) -> None:
    """Raise Failure unless ``name`` is a device or one of ``extra``. key: how the message begins, as "train.device="."""
    if name not in extra and not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]*))?", name):
        *names, last = "cpu", "cuda", "cuda:N", *extra
        raise Failure(f"{key}{name}: unknown; use {', '.join(names)} or {last}")


def check_available(name: str, key: str) -> None:
    """Raise Failure for a device that torch does not see."""
    import torch  # here: reading a config does not load torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and int(name.partition(":")[2] or 0) >= count:
        seen = f"{count} CUDA device{'s' * (count != 1)}"
        raise Failure(f"{key}{name}: not available: torch {torch.__version__} sees {seen}; use {key}cpu")


def resolve(name: str, rank: int = 0) -> torch.device:
    """The device of a rank for a value of `train.device`: cuda is device rank % count, auto is cuda if available."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    check_available(name, "train.device=")
    return torch.device(f"cuda:{rank % torch.cuda.device_count()}" if name == "cuda" else name)


def check_nccl(name: str, device: torch.device, processes: int) -> None:
    """Raise Failure unless train.backend=nccl can have a CUDA device for each of so many processes on this machine.

    name: train.device; device: what it stands for.
    """
    import torch

    if device.type == "cpu":
        raise Failure(f"train.backend=nccl: needs CUDA, train.device={name} is the CPU; use train.backend=auto")
    count = 1 if ":" in name else torch.cuda.device_count()
    if processes > count:
        why = f"{processes} processes need a CUDA device each, train.device={name} has {count}"
        raise Failure(f"train.backend=nccl: {why}; use train.backend=auto")


def number(device: torch.device) -> float:
    """A whole number below 2⁴⁸ that tells a CUDA device from all others of all hosts; 0 for the CPU."""
    if device.type != "cuda":
        return 0.0
    import torch

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return float(int(hashlib.sha256(uuid.encode()).hexdigest()[:12], 16))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work, so that a clock can be read."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
