"""The record of a run by epoch: metrics.csv and TensorBoard events."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from ..errors import Failure
from ..utils import filesystem
from .run_dir import METRICS


def rows_before(path: Path, epoch: int) -> list[dict[str, Any]]:
    """The rows of a metrics.csv before an epoch, exactly as written. Raises Failure if the file is damaged."""
    if not path.is_file():
        return []
    try:
        table = pd.read_csv(path, float_precision="round_trip")
        return table[table["epoch"] < epoch].to_dict("records")
    except (ValueError, KeyError) as error:  # of pandas, for text that is no such table
        raise Failure(f"{path}: not the metrics of a run ({str(error).splitlines()[0]}); copy it again") from error


class MetricsLog:
    """Writes the epochs of a run from ``epoch`` on; later rows that an interrupted attempt left are dropped."""

    def __init__(self, folder: Path, epoch: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / METRICS
        self.rows = rows_before(self.path, epoch)
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)

    def add(self, epoch: int, row: dict[str, float], memory: Sequence[float] = (), z: Tensor | None = None) -> None:
        """Record an epoch. memory: peak of each rank in GB; z (n, 3): positions of virtual nodes."""
        self.rows.append({"epoch": epoch, **row})
        filesystem.write_atomically(self.path, pd.DataFrame(self.rows).to_csv(index=False).encode())
        ranks = {f"memory_gb/rank{rank}": gb for rank, gb in enumerate(memory)}
        try:
            for name, value in {**row, **ranks}.items():
                self.events.add_scalar(name, value, epoch)
            for axis, values in zip("xyz", z.T if z is not None and len(z) else (), strict=False):
                self.events.add_histogram(f"virtual_nodes/{axis}", values, epoch)
            self.events.flush()
        except OSError as error:
            raise Failure(
                f"{self.events.log_dir}: cannot be written ({error.strerror}); free disk space, then resume the run"
            ) from error

    def close(self) -> None:
        with suppress(OSError):  # of a full disk, which `add` has reported
            self.events.close()
