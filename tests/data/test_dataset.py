"""A process opens a store once; the ranks of halo mode cache the same samples."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dgl import DGLGraph
from tiny_runs import PLAIN_TRAIN, settings

from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.data import dataset
from dist_egnn.data.store import Store, open_store
from dist_egnn.train import trainer

MakeStore = Callable[..., Path]
PLAIN_INIT = Store.__init__


def record_openings(log: Path) -> None:
    """Make this process write a line to the file for each store that it opens."""

    def init(store: Store, path: str | Path) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{path}\n")
        PLAIN_INIT(store, path)

    Store.__init__ = init  # type: ignore[method-assign]


def recorded_train(folder: Path, comm: Any, *given: Any) -> Any:
    if comm.size > 1:
        record_openings(folder / f"{comm.rank}.log")
    return PLAIN_TRAIN(comm, *given)


@pytest.mark.parametrize(("parts", "partitioned"), [(1, True), (2, True), (2, False)])
def test_the_command_and_each_rank_open_a_store_once(make_store, small, tmp_path, monkeypatch, parts, partitioned):
    store = tmp_path / "run" / "store"
    data = Path(shutil.copytree(make_store(parts, "random"), tmp_path / "data")) if partitioned else small
    config = settings(data, tmp_path / "run", "train.epochs=1", f"partition.parts={parts}", "partition.method=random")
    monkeypatch.setattr(trainer, "train", functools.partial(recorded_train, tmp_path))
    monkeypatch.setattr(Store, "__init__", PLAIN_INIT)  # restored after the test
    record_openings(tmp_path / "command.log")
    run_training(config)
    run_evaluation(tmp_path / "run")
    logs = {file.stem: file.read_text().splitlines() for file in tmp_path.glob("*.log")}
    # a store that is written is opened once before it gets its name
    logs = {name: [line for line in lines if not line.endswith(".partial")] for name, lines in logs.items()}
    processes = ["command", *map(str, range(parts) if parts > 1 else ())]
    assert logs == {name: [str(data if partitioned else store)] for name in processes}


def test_a_store_is_opened_again_if_its_manifest_changed(make_store: MakeStore, tmp_path: Path) -> None:
    path = Path(shutil.copytree(make_store(2), tmp_path / "store"))
    store = open_store(path)
    assert open_store(str(path / ".." / "store")) is store
    os.utime(path / "manifest.yaml", (0, 0))
    assert open_store(path) is not store


def test_ranks_cache_the_same_samples(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """They link together, so none may evict a sample that another still has: all read the same samples again."""
    config = settings(make_store(3, "kmeans"), Path("unused"), "partition.halo=exchange")
    monkeypatch.setattr(dataset, "CACHE_BYTES", 3 * 300_000)  # for three ranks; a sample counts for about 100,000
    plain_read = Store.read
    reads: list[list[int]] = [[], [], []]

    def recorded(store: Store, number: int, part: int, exchange: bool) -> DGLGraph:
        reads[part].append(number)
        return plain_read(store, number, part, exchange)

    monkeypatch.setattr(Store, "read", recorded)
    numbers = np.random.default_rng(0).integers(0, 12, 60).tolist()
    for rank in range(3):
        samples = dataset.open_dataset(config, rank, 3)
        for number in numbers:
            samples[number]
    assert reads[0] == reads[1] == reads[2]
    assert 12 < len(reads[0]) < len(numbers)  # some samples were evicted, some were not
