"""The engine that runs the messages of EGNN layers by the native kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .kernels import MAX_HIDDEN, EdgeBlock, EdgeKernel, EdgeMeans
from .library import Library, load

Fields = dict[str, Tensor]


class NativeEngine:
    """The messages of an EGNN layer by the native kernels (ops/native), which need no array of E rows: a tile is one block."""

    name = "native"

    def __init__(self, library: Library) -> None:
        self.library = library

    def block(self, src: Tensor, dst: Tensor, n_src: int, n_dst: int) -> Any:
        start = functional.pad(torch.bincount(dst, minlength=n_dst).cumsum(0), (1, 0))
        return EdgeBlock(start.int(), src.int().contiguous())

    def mean(
        self,
        block: Any,
        layer: Any,
        src: Fields,
        dst: Fields,
        edge: Fields,
        known: Fields | None = None,
    ) -> Fields:
        names = ("dx", "m") if "h" in layer.outputs else ("dx",)
        means = None if known is None else tuple(known[name] for name in names)
        kernel = EdgeKernel(self.library, block, layer.normalize, layer.bf16, "m" in names, means)
        ends = dst["p"], src["q"], dst["x"], src["x"], edge.get("e"), edge.get("shift")
        result = dict(zip(names, EdgeMeans.apply(kernel, *ends, *layer.message_weights()), strict=True))
        if layer.bias is not None:  # of φ_x: not part of the kernel
            result["dx"] = result["dx"] + layer.bias * _mean_difference(block, dst["x"], src["x"], edge.get("shift"))
        return result


def _mean_difference(block: EdgeBlock, x_dst: Tensor, x_src: Tensor, shift: Tensor | None) -> Tensor:
    """mean_j (x_i − x_j − shift) (n, 3) of x_dst (n, 3), x_src (n_src, 3), shift (E, 3)."""
    if not len(block.source):
        return torch.zeros_like(x_dst)
    mean = partial(functional.embedding_bag, offsets=block.start, mode="mean", include_last_offset=True)
    result = x_dst * (block.start.diff() > 0).unsqueeze(1) - mean(block.source, x_src)
    edges = torch.arange(len(block.source), dtype=torch.int32)
    return result if shift is None else result - mean(edges, shift)


def obstacle(hidden: int, dtype: torch.dtype, device: torch.device | str, bf16: bool) -> str:
    """Why the native kernels cannot run messages of this width and type here; "" if they can."""
    loaded = load()
    if not isinstance(loaded, Library):
        return f"the native kernels are missing ({loaded})"
    if torch.device(device).type != "cpu":
        return f"the native kernels run on the CPU, not on {device}"
    if hidden % 16 or not 16 <= hidden <= MAX_HIDDEN:
        return f"model.hidden={hidden} is not a multiple of 16 up to {MAX_HIDDEN}"
    if dtype not in (torch.float32, torch.float64):
        return f"the native kernels compute in float32 or float64, not in {dtype}"
    if bf16 and not (loaded.bfloat16 and dtype == torch.float32):
        return "this processor has no products in bfloat16"
    return ""
