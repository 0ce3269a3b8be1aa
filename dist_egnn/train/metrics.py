"""Errors over all partitions, the fit of the linear baseline, and peak memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from dgl import DGLGraph
from torch import Tensor

from ..config import Model
from ..distributed.comm import Comm
from ..models.published_baselines import PUBLISHED
from .losses import moving_nodes


def prediction_name(model: Model) -> str:
    """A model's name in tables of errors, which tells the model `Linear` from the baseline `linear`."""
    if model.as_published and model.name in (baseline.__name__ for baseline in PUBLISHED):
        return f"{model.name} (published)"
    return "Linear (trained)" if model.name == "Linear" else model.name


def peak_memory_gb(device: torch.device | None = None) -> float:
    """Peak resident memory of this process, or of its CUDA device, in GB (10⁹ bytes)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # unlike ru_maxrss, VmHWM is not inherited from the parent through exec
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def mean_squared_error(pairs: Iterable[tuple[Tensor, Tensor]], comm: Comm) -> float:
    """The MSE of (predicted, target) pairs, each (N, 3), over nodes, components and all partitions."""
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    for predicted, target in pairs:
        target = target.to(predicted.device, torch.float64)
        total[0] += (predicted.double() - target).square().sum().to(total)
        total[1] += target.numel()
    total = comm.sum(total)
    return float(total[0] / total[1])


def fitted_time(graphs: Iterable[DGLGraph], comm: Comm) -> float:
    """The time t of the linear baseline x + t v, by least squares to y over all nodes that move: Σ v·(y − x) / Σ v·v."""
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    for graph in graphs:
        x, v, y = (graph.ndata[name][moving_nodes(graph)].double() for name in ("x", "v", "y"))
        total += torch.stack([(v * (y - x)).sum(), (v * v).sum()])
    total = comm.sum(total)
    return float(total[0] / total[1].clamp(min=1e-300))
