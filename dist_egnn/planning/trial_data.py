"""The data of a plan's trial: the run's, or a store made of some of its snapshots. Shapes: S snapshots, P parts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Config
from ..data import dataset, samples
from ..data.edges import EdgeRule
from ..data.samples import Snapshot
from ..data.store import Store, open_store
from ..data.store_inputs import check_settings
from ..data.trajectories import Trajectories
from ..errors import Failure

Say = Callable[[str], None]
MIN_BATCHES = 3  # of snapshots, that each rank is tried on
SHARDS = 3  # of a store made for the trial: two are in memory while the next is read
COLUMNS = ["nodes", "edges", "cut_edges", "halo"]


@dataclass
class Source:
    """Data of the trial, and sizes of the run's data."""

    config: Config  # names the data of the trial
    snapshots: list[int]  # the trial's training snapshots
    tried: np.ndarray  # (S, P, 2): their nodes and the in-edges that each part computes on, in halo mode all in-edges
    counts: dict[str, np.ndarray]  # the same of all snapshots of the run, by split
    table: np.ndarray  # (S, P, 4): COLUMNS
    partition_s: float = 0.0  # seconds to write the run's store, 0 if it exists
    machines: int = 1  # that the store was made for


class _Subset(Trajectories):
    """Some trajectories of a file."""

    def __init__(self, path: Path, chosen: Sequence[int]) -> None:
        super().__init__(path)
        self._all = [self._all[k] for k in chosen]


def _computed(table: np.ndarray, config: Config) -> np.ndarray:
    """COLUMNS (…, 4) → nodes and the edges that are computed on (…, 2): in bridge mode those that are not cut."""
    if config.partition.halo == "exchange":
        return table[..., :2]
    return np.stack([table[..., 0], table[..., 1] - table[..., 2]], -1)


def _table(store: Store) -> np.ndarray:
    return store.parts_table[COLUMNS].to_numpy(float).reshape(len(store.snapshots), store.parts, 4)


def _scaled(config: Config, file: Trajectories, selected: list[Snapshot], sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Nodes and edges (S, P, 2) of all snapshots by split, scaled from those of one (P, 2) by the number of nodes."""
    powers, counts = [1, 2 if EdgeRule.of(config.data).complete else 1], {}  # a complete graph's edges: the square
    for split in ("train", "valid"):
        nodes = np.array([file[s.trajectory].nodes for s in selected if s.split == split], float)
        counts[split] = (nodes / sizes[:, 0].sum())[:, None, None] ** powers * sizes
    return counts


def whole_source(config: Config, file: Trajectories, selected: list[Snapshot]) -> Source:
    """The source of a run of one process on a trajectories file."""
    train = [k for k, s in enumerate(selected) if s.split == "train"]
    largest = max(train, key=lambda k: file[selected[k].trajectory].nodes)
    graph = dataset.open_dataset(config, 0, 1)[largest]
    counts = _scaled(config, file, selected, np.array([[graph.num_nodes(), graph.num_edges()]], float))
    table = np.pad(np.concatenate([*counts.values()]), ((0, 0), (0, 0), (0, 2)))  # no edge is cut
    return Source(config, train, counts["train"], counts, table)


def partitioned_source(config: Config, file: Trajectories, selected: list[Snapshot], folder: Path, say: Say) -> Source:
    """The source of a run on a trajectories file: ``folder`` gets a store that fills the shards that memory holds."""
    from ..partition import store_writer

    frames_of = Counter(s.trajectory for s in selected if s.split == "train")
    order = sorted(frames_of, key=lambda k: -file[k].nodes)
    largest = file[order[0]].nodes
    target = SHARDS * max(store_writer.SHARD_NODES, largest)
    frames = min(frames_of[order[0]], -(-target // largest))
    chosen, nodes = list[int](), 0
    for k in order:
        if nodes < target or len(chosen) * frames < MIN_BATCHES * config.train.batch_size:
            chosen.append(k)
            nodes += file[k].nodes * min(frames, frames_of[k])
    subset, trial, cut = _Subset(file.path, chosen), deepcopy(config), config.partition
    if frames < max(frames_of.values()):
        trial.data.frames = frames
    inputs = store_writer.build_inputs(
        subset, parts=cut.parts, weights=cut.weights, method=cut.method, method_seed=cut.seed, settings=trial.data
    )
    count = len(store_writer.list_snapshots(subset, inputs))
    say(f"partitioning {count} of {len(selected)} snapshots into {cut.parts} parts")
    started = time.perf_counter()
    store_writer.write_store(subset, folder / "store", inputs, lambda done, _all: None)
    seconds = time.perf_counter() - started
    trial.data.path = str(folder / "store")
    table = _table(open_store(trial.data.path))
    snapshot_nodes = table[:, :, 0].sum(1)
    largest_ones = np.isclose(snapshot_nodes, snapshot_nodes.max())
    counts = _scaled(config, file, selected, _computed(table[largest_ones].mean(0), config))
    seconds *= sum(file[s.trajectory].nodes for s in selected) / snapshot_nodes.sum()
    return Source(trial, list(range(len(table))), _computed(table, config), counts, table, seconds)


def open_source(config: Config, parts: int, folder: Path, say: Say) -> Source:
    """The source of a config's run on ``parts`` processes. folder: for a store. Raises Failure as `train` would."""
    d = config.data
    if dataset.is_store(d.path):
        store = open_store(d.path)
        check_settings(store.inputs, str(store.path), d)
        table = _table(store)
        counts = {name: _computed(table[store.split(name)], config) for name in ("train", "valid")}
        several = store.trainers > 1 or store.inputs["shard_nodes"] == 0  # as graph servers need
        machines = store.machines if several else 1
        source = Source(config, store.split("train"), counts["train"], counts, table, machines=machines)
    else:
        file = Trajectories(d.path)
        chosen = d.frames, d.first_frame, d.last_frame, d.frame_seed
        selected = samples.select_snapshots(file, d.horizon, *chosen, d.history + d.pushforward, d.velocity)
        if not any(s.split == "train" for s in selected):
            raise Failure(f"{d.path}: no snapshot in split 'train'; prepare data with one")
        given = config, file, selected
        source = whole_source(*given) if parts == 1 else partitioned_source(*given, folder, say)
    for split, sizes in source.counts.items():
        if not len(sizes):
            raise Failure(f"{d.path}: no snapshot in split '{split}'; prepare data with one")
    return source
