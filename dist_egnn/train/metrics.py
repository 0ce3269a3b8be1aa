"""Numbers about a run: errors over partitions, baselines, and the files they are written to."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from dgl import DGLGraph
from torch import Tensor

from ..distributed.comm import Comm
from ..errors import Failure
from ..utils import filesystem


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


def rows_before(path: Path, epoch: int) -> list[dict[str, Any]]:
    """The rows of a metrics.csv that lie before an epoch, exactly as they were written. Raises Failure if it is damaged."""
    if not path.is_file():
        return []
    try:
        table = pd.read_csv(path, float_precision="round_trip")
        return table[table["epoch"] < epoch].to_dict("records")
    except (ValueError, KeyError) as error:  # what pandas raises for text that is no such table
        raise Failure(f"{path}: not the metrics of a run ({str(error).splitlines()[0]}); copy it again") from error


class Recorder:
    """metrics.csv and TensorBoard events of a run; only rank 0 has one."""

    def __init__(self, folder: Path, epoch: int = 0) -> None:
        """epoch: where the run goes on; what earlier attempts recorded of it and later ones is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.csv"
        self.rows = rows_before(self.path, epoch)
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)

    def add(self, epoch: int, row: dict[str, float], memory: Sequence[float] = (), z: Tensor | None = None) -> None:
        """Record an epoch. memory: peak of each rank in GB; z (n, 3): positions of virtual nodes."""
        self.rows.append({"epoch": epoch, **row})
        filesystem.write_whole(self.path, pd.DataFrame(self.rows).to_csv(index=False).encode())
        ranks = {f"memory_gb/rank{rank}": gb for rank, gb in enumerate(memory)}
        try:
            for name, value in {**row, **ranks}.items():
                self.events.add_scalar(name, value, epoch)
            for axis, values in zip("xyz", z.T if z is not None and len(z) else (), strict=False):
                self.events.add_histogram(f"virtual_nodes/{axis}", values, epoch)
            self.events.flush()
        except OSError as error:
            raise Failure(
                f"{self.events.log_dir}: cannot be written ({error.strerror}); make room, then go on"
            ) from error

    def close(self) -> None:
        with suppress(OSError):  # a full disk was told of by `add`
            self.events.close()
