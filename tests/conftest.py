"""What tests share: a small trajectories file, and stores made from it. Both are read only; copy what you damage."""

from __future__ import annotations

import functools
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from small import DATA, falling_swirl

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells leave it to jobs in the background: tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("ours", deadline=None)  # machines differ, and are shared
hypothesis.settings.load_profile("ours")

SIZES = (200, 250, 220, 210)
SPLITS = ("train", "train", "valid", "test")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trajectories.h5: four trajectories of 200 to 250 nodes and 14 frames; two train, one valid, one test."""
    from dist_egnn.data.trajectories import Writer

    path = tmp_path_factory.mktemp("small") / "small.h5"
    with Writer(path, {"command": "tests/conftest.py"}) as out:
        for seed, (nodes, split) in enumerate(zip(SIZES, SPLITS, strict=True)):
            position, velocity, attributes = falling_swirl(nodes, seed)
            out.add(position, split=split, dt=1.0, source="test", velocity=velocity, attributes=attributes)
    return path


def _inputs(
    path: Path,
    parts: int,
    method: str = "metis",
    shard_nodes: int = 1500,
    trainers: int = 1,
    weights: Sequence[float] | None = None,
    **data: Any,
) -> Any:
    """The inputs of a store of ``path`` under DATA, other settings by name."""
    from dist_egnn.partition import store_writer

    from dist_egnn.config import Data
    from dist_egnn.data.trajectories import Trajectories

    return store_writer.build_inputs(
        Trajectories(path),
        parts=parts,
        trainers=trainers,
        weights=weights,
        method=method,
        method_seed=0,
        settings=Data(**{**DATA, **data}),
        shard_nodes=shard_nodes,
    )


@pytest.fixture(scope="session")
def make_inputs(small: Path) -> Callable[..., Any]:
    """make_inputs(parts, method="metis", shard_nodes=1500, trainers=1, weights=None, **data settings): inputs of such a store."""
    return functools.partial(_inputs, small)


@pytest.fixture(scope="session")
def make_store(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_store(parts, method="metis", shard_nodes=1500, trainers=1, **data settings): such a store, made once."""
    from dist_egnn.partition import store_writer

    from dist_egnn.data.trajectories import Trajectories

    made: dict[str, Path] = {}

    def make(parts: int, method: str = "metis", shard_nodes: int = 1500, trainers: int = 1, **data: Any) -> Path:
        key = repr((parts, method, shard_nodes, trainers, sorted(data.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("store") / "store"
            inputs = _inputs(small, parts, method, shard_nodes, trainers, **data)
            store_writer.write_store(Trajectories(small), out, inputs, lambda *_: None)
            made[key] = out
        return made[key]

    return make
