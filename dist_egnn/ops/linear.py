"""Products with weights, by the native kernels while the native engine runs a layer, else by torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
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


def linear(x: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b (n, O) for x (n, I) or its columns in parts, W (O, I), b (O,)."""
    parts = [x] if isinstance(x, Tensor) else list(x)
    library = getattr(_current, "library", None)
    if library is None or len(weight) % 16 or parts[0].dtype not in (torch.float32, torch.float64):
        return functional.linear(torch.cat(parts, 1) if len(parts) > 1 else parts[0], weight, bias)
    weights = weight.split([part.shape[1] for part in parts], 1)
    return kernels.Linear.apply(library, bias, *map(_padded, parts), *map(_padded, weights))


def _padded(x: Tensor) -> Tensor:
    """x (n, I) with columns of zeros up to a multiple of 16."""
    return functional.pad(x, (0, pad)) if (pad := -x.shape[1] % 16) else x


def mlp(phi: Any, x: Tensor | Sequence[Tensor]) -> Tensor:
    """φ(x) for a sequence of linear layers and activations; x (n, I) or its columns in parts."""
    for module in phi:
        x = linear(x, module.weight, module.bias) if isinstance(module, torch.nn.Linear) else module(x)
    assert isinstance(x, Tensor)
    return x
