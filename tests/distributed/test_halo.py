"""Halo mode: P processes compute what one does on the full graph: outputs, loss, every gradient (float64, 1e-10)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_exact import _each

from dist_egnn import comm, config, exactness, local, models, train
from dist_egnn.store import Store

SMALL = ["model.hidden=8", "model.layers=2", "loss.samples=4", "data.radius=0.27", "partition.halo=exchange"]


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_many_processes_equal_one_on_the_full_graph_for_every_model(
    make_store: Callable[..., Path], tmp_path: Path, parts: int
) -> None:
    settings = {name: config.load(None, [f"model.name={name}", *SMALL]) for name in models.NAMES}
    store = Store(make_store(parts, "metis"))
    for name in settings:
        (tmp_path / name).mkdir()
    local.run(_each, parts, settings, str(store.path), str(tmp_path))
    for name, one in settings.items():
        found = exactness._against_one(one, store, 1, tmp_path / name)
        assert max(found.values()) <= exactness.TOLERANCE, (name, found)
        weights = len(list(train.build_model(one, (3, 1), comm.Alone()).parameters()))
        assert sum(key.startswith("gradient") for key in found) > weights / 2  # all but some of the last layer's
