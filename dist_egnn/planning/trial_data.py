"""The data of a plan's trial: the run's own store or file, or a store of a few of its snapshots that is made for the trial.

Legend: S snapshots of a split, P parts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Config
from ..data import dataset, samples
from ..data.samples import Snapshot
from ..data.store import Store
from ..data.store_inputs import check_settings
from ..data.trajectories import Trajectories
from ..errors import Failure

Say = Callable[[str], None]
TRIED = 3  # batches of snapshots that a rank is tried on at least
SHARDS = 3  # of a store that is made for the trial: two are kept in memory while the next is read
COLUMNS = ["nodes", "edges", "cut_edges", "halo"]


@dataclass
class Source:
    """What is tried and what is trained on.

    config: names the data of the trial; numbers: its train snapshots; tried (S, P, 2): nodes of each and the in-edges that it
    computes on, in halo mode all; counts: the same of all snapshots of the run, by split; table (S, P, 4): COLUMNS;
    partition_s: writing the run's store, 0 if there is one.
    """

    config: Config
    numbers: list[int]
    tried: np.ndarray
    counts: dict[str, np.ndarray]
    table: np.ndarray
    partition_s: float = 0.0


class _Few(Trajectories):
    """Some trajectories of a file."""

    def __init__(self, path: Path, chosen: Sequence[int]) -> None:
        super().__init__(path)
        self._all = [self._all[k] for k in chosen]


def _own(table: np.ndarray, config: Config) -> np.ndarray:
    """COLUMNS (…, 4) → nodes and edges (…, 2), in bridge mode those that are not cut."""
    if config.partition.halo == "exchange":
        return table[..., :2]
    return np.stack([table[..., 0], table[..., 1] - table[..., 2]], -1)


def _of_store(store: Store) -> np.ndarray:
    return store.parts_table[COLUMNS].to_numpy(float).reshape(len(store.snapshots), store.parts, 4)


def stored(config: Config) -> Source:
    """A store that is there."""
    store = Store(config.data.path)
    check_settings(store.inputs, str(store.path), config.data)
    table = _of_store(store)
    splits = {name: store.split(name) for name in ("train", "valid")}
    counts = {name: _own(table[numbers], config) for name, numbers in splits.items()}
    return Source(config, splits["train"], counts["train"], counts, table)


def _listed(config: Config) -> tuple[Trajectories, list[Snapshot]]:
    """A trajectories file and the snapshots that the config makes of it."""
    d = config.data
    file = Trajectories(d.path)
    return file, list(samples.select_snapshots(file, d.horizon, d.frames, d.first_frame, d.last_frame, d.frame_seed))


def _counts(file: Trajectories, listed: list[Snapshot], like: np.ndarray, complete: bool) -> dict[str, np.ndarray]:
    """Nodes and own edges (S, P, 2) of all snapshots by split, in proportion to those of one (P, 2): like its nodes of each part,
    and as many edges a node; in complete graphs edges go with the square."""
    found = {}
    for split in ("train", "valid"):
        nodes = np.array([file[s.trajectory].nodes for s in listed if s.split == split], float).reshape(-1, 1)
        scale = nodes / like[:, 0].sum()
        found[split] = np.stack([scale * like[:, 0], (scale**2 if complete else scale) * like[:, 1]], -1)
    return found


def whole(config: Config) -> Source:
    """A trajectories file that one process trains from."""
    file, listed = _listed(config)
    numbers = [k for k, s in enumerate(listed) if s.split == "train"]
    if not numbers:
        raise Failure(f"{config.data.path}: no snapshot in split 'train'; prepare data with one")
    largest = max(numbers, key=lambda k: file[listed[k].trajectory].nodes)
    graph = dataset.open_dataset(config, 0, 1)[largest]
    like = np.array([[graph.num_nodes(), graph.num_edges()]], float)
    counts = _counts(file, listed, like, math.isinf(config.data.radius))
    table = np.pad(np.concatenate([*counts.values()]), ((0, 0), (0, 0), (0, 2)))  # nothing is cut
    return Source(config, numbers, counts["train"], counts, table)


def cut(config: Config, parts: int, folder: Path, say: Say) -> Source:
    """A trajectories file that P processes will share: a few of its snapshots are partitioned into ``folder``.

    As many as fill the shards that a rank holds at a time, or all: a shard's size is part of the memory.
    """
    from ..partition import store_writer

    file, listed = _listed(config)
    train_ones = [s for s in listed if s.split == "train"]
    if not train_ones:
        raise Failure(f"{config.data.path}: no snapshot in split 'train'; prepare data with one")
    per = {k: sum(s.trajectory == k for s in train_ones) for k in dict.fromkeys(s.trajectory for s in train_ones)}
    order = sorted(per, key=lambda k: -file[k].nodes)
    wanted = SHARDS * max(store_writer.SHARD_NODES, file[order[0]].nodes)
    frames = min(per[order[0]], -(-wanted // file[order[0]].nodes))
    chosen: list[int] = []
    nodes = 0
    for k in order:
        if nodes < wanted or len(chosen) * frames < TRIED * config.train.batch_size:
            chosen.append(k)
            nodes += file[k].nodes * min(frames, per[k])
    few = _Few(file.path, chosen)
    trial = deepcopy(config)
    if frames < max(per.values()):
        trial.data.frames = frames
    inputs = store_writer.build_inputs(
        few,
        parts=parts,
        weights=config.partition.weights,
        method=config.partition.method,
        method_seed=config.partition.seed,
        settings=trial.data,
    )
    say(f"partitioning {len(store_writer.list_snapshots(few, inputs))} of {len(listed)} snapshots into {parts} parts")
    started = time.perf_counter()
    store_writer.write_store(few, folder / "store", inputs, lambda done, _all: None)
    seconds = time.perf_counter() - started
    trial.data.path = str(folder / "store")
    store = Store(trial.data.path)
    table = _of_store(store)
    nodes_of_run = sum(file[s.trajectory].nodes for s in listed)
    largest = int(table[:, :, 0].sum(1).argmax())
    alike = np.isclose(table[:, :, 0].sum(1), table[largest, :, 0].sum())
    counts = _counts(file, listed, _own(table[alike].mean(0), config), math.isinf(config.data.radius))
    seconds *= nodes_of_run / table[:, :, 0].sum()
    return Source(trial, list(range(len(table))), _own(table, config), counts, table, seconds)


def of(config: Config, parts: int, folder: Path, say: Say) -> Source:
    """The source of a config's run on ``parts`` processes; what has to be made is made in ``folder``.

    Raises Failure for data that `train` would refuse.
    """
    if dataset.is_store(config.data.path):
        source = stored(config)
    else:
        source = whole(config) if parts == 1 else cut(config, parts, folder, say)
    for split, counts in source.counts.items():
        if not len(counts):
            raise Failure(f"{config.data.path}: no snapshot in split '{split}'; prepare data with one")
    return source
