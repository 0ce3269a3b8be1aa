"""Numbers about a run: errors over partitions, baselines, and the files they are written to."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from dgl import DGLGraph
from torch import Tensor

from .comm import Comm


def peak_memory_gb(device: torch.device | None = None) -> float:
    """The largest resident memory this process has had, or memory of its CUDA device, in GB (10⁹ bytes)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss outlives exec on Linux: it would count what started us
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def mean_squared_error(pairs: Iterable[tuple[Tensor, Tensor]], comm: Comm) -> float:
    """The mean over all nodes and components of (predicted, target) pairs (N, 3), of all partitions."""
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    for predicted, target in pairs:
        target = target.to(predicted.device, torch.float64)
        total[0] += (predicted.double() - target).square().sum().to(total)
        total[1] += target.numel()
    total = comm.sum(total)
    return float(total[0] / total[1])


def fitted_time(graphs: Iterable[DGLGraph], comm: Comm) -> float:
    """The time t that makes x + t v nearest to y in the least squares over all nodes: Σ v·(y − x) / Σ v·v."""
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    for graph in graphs:
        x, v, y = (graph.ndata[name].double() for name in ("x", "v", "y"))
        total += torch.stack([(v * (y - x)).sum(), (v * v).sum()])
    total = comm.sum(total)
    return float(total[0] / total[1].clamp(min=1e-300))


class Recorder:
    """metrics.csv and TensorBoard events of a run; only rank 0 has one."""

    def __init__(self, folder: Path, keep: int = 0) -> None:
        """keep: rows of an earlier metrics.csv to go on from (a resumed run has that many epochs behind it)."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        if keep and self.path.is_file():
            self.rows = pd.read_csv(self.path).head(keep).to_dict("records")
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=keep)

    def add(self, epoch: int, row: dict[str, float]) -> None:
        """Record an epoch."""
        self.rows.append({"epoch": epoch, **row})
        fresh = self.path.with_suffix(".csv.partial")
        pd.DataFrame(self.rows).to_csv(fresh, index=False)
        fresh.replace(self.path)
        for name, value in row.items():
            self.events.add_scalar(name, value, epoch)
        self.events.flush()

    def close(self) -> None:
        self.events.close()
