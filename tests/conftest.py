"""Shared fixtures: a small trajectories file and stores made from it. Tests that modify them work on a copy."""

from __future__ import annotations

import importlib.metadata
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import command_server
import hypothesis
import pytest
from small_data import DATA, falling_swirl, random_pairs

import dist_egnn  # noqa: F401  (before DGL, see dist_egnn/data/dgl_compat.py)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # shells ignore it for background jobs, tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("slow machine", deadline=None, suppress_health_check=slow)
hypothesis.settings.load_profile("slow machine")

LONGEST = ["many_machines", "served", "wheel", "examples", "simulator_training", "halo_mode", "docs_commands", "resume"]
LONGEST += ["hosts", "exact", "nbody", "sweep", "surroundings", "import", "bench"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files that take longest first: `make test` gives whole files to its processes, and none may wait alone.

    With DGL 2, tests of graph servers are skipped.
    """
    if importlib.metadata.version("dgl").split(".")[0] != "1":
        for item in items:
            if item.get_closest_marker("servers"):
                item.add_marker(pytest.mark.skip(reason="needs DGL 1's graph servers"))
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trajectories.h5: four trajectories of 200 to 250 nodes and 14 frames; two train, one valid, one test."""
    from dist_egnn import Writer

    path = tmp_path_factory.mktemp("small") / "small.h5"
    with Writer(path, {"command": "tests/conftest.py"}) as out:
        for seed, (nodes, split) in enumerate([(200, "train"), (250, "train"), (220, "valid"), (210, "test")]):
            position, velocity, attributes = falling_swirl(nodes, seed)
            given = {"velocity": velocity, "attributes": attributes, "edges": random_pairs(nodes, seed)}
            out.add(position, split=split, dt=1.0, source="test", **given)
    return path


@pytest.fixture(scope="session")
def distegnn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The program `distegnn`, alone in a folder; commands share the imports of torch and DGL (tests/command_server.py)."""
    server, program = command_server.start(tmp_path_factory.mktemp("bin"))
    yield program
    server.communicate()


@pytest.fixture(scope="session")
def make_inputs(small: Path) -> Callable[..., Any]:
    """make_inputs(parts, method="metis", shard_nodes=1500, trainers=1, weights=None, **data keys): inputs of a store."""
    from dist_egnn.partition import store_writer

    from dist_egnn import Trajectories
    from dist_egnn.config import Data

    def make(parts: int, method: str = "metis", shard_nodes: int = 1500, trainers: int = 1, **more: Any) -> Any:
        options = {"trainers": trainers, "weights": more.pop("weights", None), "shard_nodes": shard_nodes}
        settings = Data(**{**DATA, **more})
        return store_writer.build_inputs(Trajectories(small), parts=parts, method=method, settings=settings, **options)

    return make


@pytest.fixture(scope="session")
def make_store(small: Path, make_inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_store(…): the store of the inputs that make_inputs(…) returns, written once."""
    from dist_egnn.partition import store_writer

    from dist_egnn import Trajectories

    stores: dict[str, Path] = {}

    def make(*args: Any, **options: Any) -> Path:
        inputs = make_inputs(*args, **options)
        key = repr(inputs)
        if key not in stores:
            stores[key] = tmp_path_factory.mktemp("store") / "store"
            store_writer.write_store(Trajectories(small), stores[key], inputs, lambda *_: None)
        return stores[key]

    return make
