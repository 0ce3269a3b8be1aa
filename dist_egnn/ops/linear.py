"""Products with weights, by the native kernels while the native engine runs a layer, else by torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .native import kernels
from .native.library import Library

_current = threading.local()


@contextmanager
def products_by(library: Library | None) -> Iterator[None]:
    """`linear` uses these kernels in this thread while the context lasts; None: torch."""
    before = getattr(_current, "library", None)
    _current.library = library
    try:
        yield
    finally:
        _current.library = before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b (n, O) for x (n, I), W (O, I), b (O,)."""
    library = getattr(_current, "library", None)
    if library is None or len(weight) % 16 or x.dtype not in (torch.float32, torch.float64):
        return functional.linear(x, weight, bias)
    if pad := -x.shape[1] % 16:
        x, weight = functional.pad(x, (0, pad)), functional.pad(weight, (0, pad))
    return kernels.Linear.apply(library, x, weight, bias)


def mlp(phi: Any, x: Tensor) -> Tensor:
    """φ(x) for a sequence of linear layers and activations."""
    for module in phi:
        x = linear(x, module.weight, module.bias) if isinstance(module, torch.nn.Linear) else module(x)
    return x
