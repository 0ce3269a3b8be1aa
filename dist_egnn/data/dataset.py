"""The samples of a run by split, from a trajectories file or from one process's part of a store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

from dgl import DGLGraph

from ..config import Config, Data, Partition
from ..errors import Failure
from ..utils import part_weights
from .fixed_nodes import check_fixed
from .samples import (
    SampleSpec,
    count_columns,
    displacement_scale,
    given_edges,
    length_unit,
    motion_statistics,
    read_sample,
    select_snapshots,
    snapshot_squares,
)
from .store import open_store
from .store_inputs import another, check_settings, store_widths
from .trajectories import SPLITS, Trajectories

Key = TypeVar("Key")
Item = TypeVar("Item")

CACHE_BYTES = 2 << 30  # of cached samples, for all processes of a machine together


def prefetch(make: Callable[[Key], Item], keys: Iterable[Key]) -> Generator[Item, None, None]:
    """make(key) for each key in order; a thread makes the next item while the caller uses the current one."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        futures = (thread.submit(make, key) for key in keys)
        end: Future[Item] = Future()
        for future, _ in pairwise(chain(futures, [end])):
            yield future.result()


def cached_bytes(nodes: int, edges: int) -> int:
    """Approximate memory of a cached sample: fields, structure and tiles."""
    return 64 * edges + 256 * nodes


@dataclass
class Dataset:
    """Samples by number, read on demand; the most recently used ones stay in memory."""

    read: Callable[[int], DGLGraph]
    splits: dict[str, list[int]]  # name → numbers of the samples
    names: tuple[Sequence[str], Sequence[str]]  # of the fields f and a
    widths: tuple[int, int]  # F and K of the fields f and a
    budget: int  # bytes of the cache
    frames: list[tuple[int, int]]  # trajectory and frame of each sample
    velocity_scale: float  # factor of v in the samples
    radius: float  # data.radius, or its value for a simulator whose edges have none
    # what each sample counts for in the cache, by default its own bytes; in halo mode all ranks need the same sizes, so
    # that they evict the same samples: they link a halo together
    sizes: list[int] | None = None
    statistics: Callable[[], tuple[float, float, float] | None] = lambda: (
        None
    )  # of a simulator's training split: `samples.motion_statistics`
    _cache: OrderedDict[int, tuple[DGLGraph, int]] = field(default_factory=OrderedDict)
    _used: int = 0

    def complete(self, config: Config) -> Config:
        """The config with the numbers that follow from the data."""
        return replace(config, data=replace(config.data, velocity_scale=self.velocity_scale, radius=self.radius))

    def __getitem__(self, number: int) -> DGLGraph:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number][0]
        graph = self.read(number)
        self._cache[number] = graph, self.size(number, graph)
        self._used += self._cache[number][1]
        while self._used > self.budget and len(self._cache) > 1:
            self._used -= self._cache.popitem(last=False)[1][1]
        return graph

    def size(self, number: int, graph: DGLGraph) -> int:
        """The bytes that a sample counts for in the cache."""
        return self.sizes[number] if self.sizes else cached_bytes(graph.num_nodes(), graph.num_edges())


def is_store(path: str) -> bool:
    """Whether data.path names a store (a folder) and not a trajectories file. Raises Failure if it names neither."""
    if not path:
        raise Failure("data.path is not set: name a trajectories.h5 or a store, as recipes/fluid113k/sample.h5")
    if not Path(path).exists() and not path.endswith((".h5", ".hdf5")):
        open_store(path)  # raises the Failure
    return Path(path).is_dir()


def process_count(config: Config) -> int:
    """The number of training processes: one a part in each of train.replicas groups."""
    return part_count(config) * config.train.replicas


def part_count(config: Config) -> int:
    """The number of processes that share each graph. Raises Failure if the config disagrees with the store."""
    requested, weights = config.partition.parts, config.partition.weights
    if not is_store(config.data.path):
        part_weights.validate(weights, requested or 1)
        return requested or 1
    store = open_store(config.data.path)
    stored = store.inputs["weights"]
    changes: dict[str, Any] = {"weights": weights}
    if requested not in (0, store.parts):
        given, made = f"partition.parts={requested}", f"for {store.parts}"
        changes |= {"parts": requested, "trainers": 1}
    elif weights is not None and not part_weights.equivalent(part_weights.validate(weights, store.parts), stored):
        given, made = f"{part_weights.KEY}={part_weights.to_text(weights)}", f"with {part_weights.to_text(stored)}"
    else:
        return store.parts
    remedy = another(store.path, store.inputs, **changes)
    raise Failure(f"{given}, but {config.data.path} was made {made}; leave it out, or {remedy}")


def used_partition(config: Config) -> Partition:
    """The partition section of a run: that of its store, if it was trained on one. Raises Failure without the store."""
    made, section = config.data.path, config.partition
    if not Path(made, "manifest.yaml").is_file():
        if section.parts or made.endswith((".h5", ".hdf5")) or Path(made).is_file():
            return replace(section, parts=section.parts or 1)
        raise Failure(f"{made}: the store that {config.run.dir} was trained on is missing; move it back")
    store = open_store(made)
    inputs = store.inputs
    given = {"parts": store.parts, "method": inputs["method"], "seed": inputs["method_seed"]}
    return replace(section, **given, weights=inputs["weights"])


def sample_spec(data: Data, features: Iterable[str], scale: float | None = None) -> SampleSpec:
    """The spec of a data section; features, scale: those of the section, or the ones that null stands for."""
    if (scale := data.velocity_scale if scale is None else scale) is None:
        raise Failure("data.velocity_scale=null: only training replaces it by a number; set it")
    names = tuple(features), tuple(data.node_attributes)
    plain = {name: getattr(data, name) for name in ("history", "walls", "pushforward", "edges", "neighbours")}
    plain["gravity"] = None if data.gravity is None else tuple(data.gravity)
    plain |= {"velocity": data.velocity, "velocity_scale": scale, "fixed": data.fixed}
    return SampleSpec(data.radius, data.horizon, *names, data.edge_drop, data.periodic, **plain)


def open_dataset(config: Config, part: int = 0, processes: int = 1) -> Dataset:
    """This process's part of each snapshot of a store, or a file's samples; ``processes`` share CACHE_BYTES.

    The sample ``dataset[number]`` is a DGLGraph with the fields of `fields.TABLE`, for numbers of ``dataset.splits``.
    """
    d, budget = config.data, CACHE_BYTES // processes
    if is_store(d.path):
        store = open_store(d.path)
        check_settings(store.inputs, str(store.path), d)
        splits = {name: store.split(name) for name in SPLITS}
        names, widths, sizes = (
            (store.inputs["features"], store.inputs["node_attributes"]),
            store_widths(store.inputs),
            None,
        )
        frames = list(store.snapshots[["trajectory", "frame"]].itertuples(index=False, name=None))
        if exchange := config.partition.halo == "exchange" and store.parts > 1:
            largest = store.parts_table.groupby("snapshot")[["nodes", "edges"]].max().to_numpy().tolist()
            sizes = [cached_bytes(nodes, edges) for nodes, edges in largest]
        numbers = store.inputs["velocity_scale"], store.inputs["radius"]
        given = splits, names, widths, budget, frames, *numbers, sizes, store.statistics
        return Dataset(lambda number: store.read(number, part, exchange), *given)
    file = Trajectories(d.path)
    chosen = d.frames, d.first_frame, d.last_frame, d.frame_seed, d.history + d.pushforward, d.velocity
    snapshots = select_snapshots(file, d.horizon, *chosen)
    scale = displacement_scale(file, snapshots, d)
    spec = sample_spec(d, d.features if d.features is not None else (*file[0].attributes, "speed"), scale)
    check_fixed(file, spec.fixed)
    for k in range(len(file)):
        given_edges(file, k, spec.rule)
        if spec.periodic:
            file.sides(k, spec.rule.longest)
    spec = replace(spec, radius=length_unit(file, snapshots, spec))
    splits = {name: [i for i, s in enumerate(snapshots) if s.split == name] for name in SPLITS}
    names, frames = (spec.features, spec.node_attributes), [(s.trajectory, s.frame) for s in snapshots]
    widths = count_columns(file, spec.features), count_columns(file, spec.node_attributes)

    def statistics() -> tuple[float, float, float] | None:
        if not spec.past:
            return None
        return motion_statistics(snapshot_squares(file, snapshots[number], spec) for number in splits["train"])

    given = splits, names, widths, budget, frames, scale, spec.radius, None, statistics
    return Dataset(lambda number: read_sample(file, snapshots[number], spec), *given)
