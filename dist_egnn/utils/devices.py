"""The device a process computes on, by its name; refused where it is not there, before any work."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import Failure

if TYPE_CHECKING:
    import torch


def check_name(name: str, key: str, *more: str) -> None:
    """Raise Failure for what is no device, nor one of ``more``. ``key``: how the user set it, "train.device=", "--device "."""
    if name not in more and not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]*))?", name):
        *known, last = "cpu", "cuda", "cuda:N", *more
        raise Failure(f"{key}{name}: unknown; use {', '.join(known)} or {last}")


def check_there(name: str, key: str) -> None:
    """Raise Failure for a device that torch does not see."""
    import torch  # a config is read without it

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and int(name.partition(":")[2] or 0) >= count:
        seen = f"{count} CUDA device{'s' * (count != 1)}"
        raise Failure(f"{key}{name}: not there: torch {torch.__version__} sees {seen}; use {key}cpu")


def of(name: str, rank: int = 0) -> torch.device:
    """What `train.device` means to a process: cuda is the device rank % count, auto is cuda where there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    check_there(name, "train.device=")
    return torch.device(f"cuda:{rank % torch.cuda.device_count()}" if name == "cuda" else name)


def wait(device: torch.device) -> None:
    """Return when the device has done all it was asked for: a clock read before that tells nothing."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
