"""`distegnn verify`: check the files of a store and, with a config, that P processes compute what one computes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..config import Config
from ..data.store import Store
from ..errors import Failure
from ..evaluate import parallel_check
from ..partition.verify import verify_store
from ..utils.console import print_table
from ..utils.progress import progress_bar


def run_verification(path: Path, config: Config | None, snapshot: int | None = None) -> None:
    """Check a store and print what it holds. With a config, also compare its model on P processes with one process.

    snapshot: its number; None: the middle one, since the first may be more symmetric than most.
    """
    store = Store(path)  # not open_store: the files are to be hashed now
    snapshot = len(store.snapshots) // 2 if snapshot is None else snapshot
    if not 0 <= snapshot < len(store.snapshots):
        raise Failure(f"--snapshot {snapshot}: {path} has snapshots 0 to {len(store.snapshots) - 1}")
    with progress_bar("verifying", len(store.snapshots)) as tick:
        counts = verify_store(store, lambda done, _all: tick(completed=done))
    print(f"{path}: whole:", ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    if config is None:
        return
    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        errors = parallel_check.compare(config, store, snapshot, Path(folder))
    gradients = {k: v for k, v in errors.items() if k.startswith("gradient")}
    worst = max(gradients, key=gradients.__getitem__)
    rows = [[k, f"{v:.1e}"] for k, v in errors.items() if k not in gradients]
    rows += [[f"{len(gradients)} gradients, worst {worst.removeprefix('gradient ')}", f"{gradients[worst]:.1e}"]]
    graph = "full graph" if config.partition.halo == "exchange" else "same cut graph"
    title = f"{store.parts} processes against one on the {graph}, float64, snapshot {snapshot}"
    print_table(title, ["compared", "largest relative error"], rows)
    for name, error in errors.items():
        if not error <= parallel_check.TOLERANCE:  # NaN too
            text = f"{path}: {name} differs by {error:.1e}, more than {parallel_check.TOLERANCE:.0e}"
            raise Failure(f"{text}: P processes do not compute what one computes; please report this")
