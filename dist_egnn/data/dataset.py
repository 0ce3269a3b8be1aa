"""The samples of a run by split, whatever they come from: a trajectories file, or a process's part of a store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from dgl import DGLGraph

from ..config import Config, Data
from ..errors import Failure
from ..utils import part_weights
from .samples import SampleSpec, read_sample, select_snapshots
from .store import Store
from .store_inputs import check_settings
from .trajectories import SPLITS, Trajectories

Key = TypeVar("Key")
Made = TypeVar("Made")

CACHE_BYTES = 2 << 30  # graphs kept ready by all processes of a machine together


def prefetch(make: Callable[[Key], Made], keys: Iterable[Key]) -> Generator[Made, None, None]:
    """make(key) of each key in order, the next one being made in a thread while the last is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        waiting: Future[Made] | None = None
        for key in keys:
            done, waiting = waiting, thread.submit(make, key)
            if done is not None:
                yield done.result()
        if waiting is not None:
            yield waiting.result()


def cached_bytes(nodes: int, edges: int) -> int:
    """What a sample that stays in memory is counted as: fields, structure and tiles, roughly."""
    return 64 * edges + 256 * nodes


class Dataset:
    """Samples by number; the latest ones stay in memory, ready for use.

    splits: name → numbers; widths: F and K of the fields f and a; frames: trajectory and frame of each number; sizes: bytes that
    each is counted as, where all ranks must keep the same ones (they link halos together); else they count their own.
    """

    def __init__(
        self,
        read: Callable[[int], DGLGraph],
        splits: dict[str, list[int]],
        widths: tuple[int, int],
        budget: int,
        frames: list[tuple[int, int]],
        sizes: list[int] | None = None,
    ) -> None:
        self._read, self.splits, self.widths, self.frames, self._sizes = read, splits, widths, frames, sizes
        self._budget, self._held = budget, 0
        self._kept: OrderedDict[int, tuple[DGLGraph, int]] = OrderedDict()

    def __getitem__(self, number: int) -> DGLGraph:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number][0]
        graph = self._read(number)
        size = self.size(number, graph)
        self._kept[number] = graph, size
        self._held += size
        while self._held > self._budget and len(self._kept) > 1:
            self._held -= self._kept.popitem(last=False)[1][1]
        return graph

    def size(self, number: int, graph: DGLGraph) -> int:
        """The bytes that a sample is counted as."""
        return self._sizes[number] if self._sizes else cached_bytes(graph.num_nodes(), graph.num_edges())


def is_store(path: str) -> bool:
    """Whether data.path means a store (a folder) rather than a trajectories file."""
    if not path:
        raise Failure(
            "data.path is not set: name a trajectories.h5 or a store, for example data.path=recipes/fluid113k/sample.h5"
        )
    if not Path(path).exists() and not path.endswith((".h5", ".hdf5")):
        Store(path)  # says what is missing
    return Path(path).is_dir()


def process_count(config: Config) -> int:
    """How many processes train: ``parts`` of them for each of train.replicas groups."""
    return part_count(config) * config.train.replicas


def part_count(config: Config) -> int:
    """How many processes share each graph. Raises Failure where the config and the store disagree."""
    wanted, weights = config.partition.parts, config.partition.weights
    if not is_store(config.data.path):
        part_weights.of(weights, wanted or 1)
        return wanted or 1
    store = Store(config.data.path)
    if wanted not in (0, store.parts):
        raise Failure(
            f"partition.parts={wanted}, but {config.data.path} was made for {store.parts}; partition again or leave it out"
        )
    if weights is not None and not part_weights.same(part_weights.of(weights, store.parts), store.inputs["weights"]):
        raise Failure(
            f"{part_weights.KEY}={part_weights.text(weights)}, but {config.data.path} was made with "
            f"{part_weights.text(store.inputs['weights'])}; partition again or leave it out"
        )
    return store.parts


def sample_spec(data: Data, features: Iterable[str]) -> SampleSpec:
    """How the data section makes samples; features: its own, or what null stands for."""
    return SampleSpec(
        data.radius, data.horizon, tuple(features), tuple(data.node_attributes), data.edge_drop, data.periodic
    )


def open_dataset(config: Config, part: int, count: int) -> Dataset:
    """The samples of a config: this process's part of each snapshot in a store, or whole ones of a trajectories file.

    count: processes of the run, which share the memory for samples.
    """
    budget = CACHE_BYTES // count
    if is_store(config.data.path):
        store = Store(config.data.path)
        check_settings(store.inputs, str(store.path), config.data)
        splits = {name: store.split(name) for name in SPLITS}
        widths = len(store.inputs["features"]), len(store.inputs["node_attributes"])
        table = store.snapshots
        frames = list(zip(table["trajectory"].tolist(), table["frame"].tolist(), strict=True))
        sizes = None
        if exchange := config.partition.halo == "exchange" and store.parts > 1:
            largest = store.parts_table.groupby("snapshot")[["nodes", "edges"]].max().to_numpy().tolist()
            sizes = [cached_bytes(nodes, edges) for nodes, edges in largest]
        return Dataset(lambda number: store.read(number, part, exchange), splits, widths, budget, frames, sizes)
    d = config.data
    file = Trajectories(d.path)
    features = tuple(d.features) if d.features is not None else (*file[0].attributes, "speed")
    spec = sample_spec(d, features)
    if spec.periodic:
        for k in range(len(file)):
            file.sides(k, spec.radius)
    listed = list(select_snapshots(file, d.horizon, d.frames, d.first_frame, d.last_frame, d.frame_seed))
    splits = {name: [i for i, s in enumerate(listed) if s.split == name] for name in SPLITS}
    widths, frames = (len(features), len(d.node_attributes)), [(s.trajectory, s.frame) for s in listed]
    return Dataset(lambda number: read_sample(file, listed[number], spec), splits, widths, budget, frames)
