"""Halo mode with threads as ranks: P parts equal the full graph for every model, partition, engine; invalid halos."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dgl
import numpy as np
import pytest
import torch
from dgl import DGLGraph
from dist_egnn.partition import assign
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import EDGES
from thread_ranks import Board, ThreadRank, differences, run_ranks, step

from dist_egnn import cli, config
from dist_egnn.data import graphs, halo
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check
from dist_egnn.models import network
from dist_egnn.models.egnn import EGNNLayer
from dist_egnn.ops import message_passing, tiled_layer, tiling
from dist_egnn.ops.native import library as native
from dist_egnn.train import trainer

TOLERANCE = parallel_check.TOLERANCE
MakeStore = Callable[..., Path]


@functools.cache
def model_of(name: str, *keys: str, double: bool = True) -> torch.nn.Module:
    settings = config.load(None, [f"model.name={name}", "model.hidden=8", "model.layers=3", "data.radius=0.27", *keys])
    model = trainer.build_model(settings, (3, 1), comm.SingleProcess()).to(torch.float64 if double else torch.float32)
    parallel_check.randomize_output_weights(model)
    return model


def halos_of(graph: DGLGraph) -> halo.Halos:
    halos = halo.get(graph)
    assert halos is not None
    return halos


def read_parts(store: Store, snapshot: int) -> list[DGLGraph]:
    """With their halos; read before the threads start, since a Store is not thread-safe."""
    return [store.read(snapshot, p, True) for p in range(store.parts)]


def parallel_differences(
    model: torch.nn.Module,
    whole: DGLGraph,
    parts: list[DGLGraph],
    rows: list[torch.Tensor] | None = None,
    whole_model: torch.nn.Module | None = None,
) -> dict[str, float]:
    """Differences of a step on parts from one on the whole graph. rows: node numbers of each part, by default gid."""
    many = run_ranks(len(parts), lambda member, copied: step(copied, parts[member.rank], member), model)
    return differences(
        step(whole_model or model, whole, comm.SingleProcess()), many, rows or [part.ndata["gid"] for part in parts]
    )


def store_differences(
    store: Store, model: torch.nn.Module, *snapshots: int, whole: torch.nn.Module | None = None
) -> dict[str, float]:
    """Differences of the store's parts in halo mode from the full graph, on a batch of snapshots.

    whole: the model of the full graph, by default the same.
    """
    parts = [halo.batch([store.read(n, p, True) for n in snapshots]) for p in range(store.parts)]
    wholes = [store.whole(n, True) for n in snapshots]
    first = np.cumsum([0, *(whole.num_nodes() for whole in wholes[:-1])])
    rows = [torch.cat([g.ndata["gid"] + f for g, f in zip(dgl.unbatch(part), first, strict=True)]) for part in parts]
    return parallel_differences(model, dgl.batch(wholes), parts, rows, whole)


def assert_exact(errors: dict[str, float]) -> None:
    assert max(errors.values()) <= TOLERANCE, errors


EVERY_MODEL = itertools.product(network.MODELS, (2, 8), ("metis",))
EVERY_METHOD = itertools.product(("FastEGNN", "RF", "FastTFN"), (3,), set(assign.METHODS) - {"metis"})


@pytest.mark.parametrize(("name", "parts", "method"), sorted([*EVERY_MODEL, *EVERY_METHOD]))
def test_parts_equal_the_full_graph(make_store: MakeStore, name: str, parts: int, method: str) -> None:
    assert_exact(store_differences(Store(make_store(parts, method)), model_of(name), 1))


@pytest.mark.parametrize("name", ["EGNN", "SchNet"])
def test_parts_of_the_published_baselines_equal_the_full_graph(make_store: MakeStore, name: str) -> None:
    """SchNet sums over neighbours, also over those of the halo."""
    model = model_of(name, "model.as_published=true")
    assert_exact(store_differences(Store(make_store(4, "metis")), model, 1))


@pytest.mark.parametrize(("edges", "method"), [("knn", "metis"), ("given", "bisection"), ("complete", "kmeans")])
def test_parts_with_other_edges_equal_the_full_graph(make_store: MakeStore, edges: str, method: str) -> None:
    """In-edges of the nearest nodes are not symmetric."""
    assert_exact(store_differences(Store(make_store(3, method, **EDGES[edges])), model_of("FastEGNN"), 1))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)


OPTIONS = ("model.attention=true", "model.normalize=true", "model.gravity=[0, 0, -1]")


@pytest.mark.parametrize(("engine", "threads"), [("dgl", 1), ("torch", 1), ("torch", 2), ("native", 1), ("native", 2)])
@pytest.mark.parametrize("keys", [(), OPTIONS], ids=["plain", "options"])
@pytest.mark.usefixtures("small_tiles")
def test_many_tiles_and_batches(make_store: MakeStore, engine: str, threads: int, keys: tuple[str, ...]) -> None:
    """Several threads compute in their own order and give the same bits. The full graph is computed by torch."""
    store = Store(make_store(3, "metis"))
    if engine == "native":
        if not native.library():
            pytest.skip("the native kernels are not compiled")
        keys = (*keys[1:], "model.hidden=16")  # not with attention
    model, whole = (model_of("FastEGNN", *keys, f"model.engine={name}", "model.tile=150") for name in (engine, "torch"))
    with tiled_layer.tile_threads(threads):
        assert_exact(store_differences(store, model, 0, 3, 1, whole=whole))


@pytest.mark.usefixtures("small_tiles")
def test_float32_and_bfloat16_messages(make_store: MakeStore) -> None:
    store = Store(make_store(2, "random"))
    for precision in ("float32", "bf16-messages"):
        model = model_of("FastEGNN", f"model.precision={precision}", "model.tile=200", double=False)
        errors = store_differences(store, model, 1)
        # in bfloat16, sums of many gradients that cancel lose more digits
        assert max(errors[name] for name in ("x", "z", "s", "embedding.weight")) <= 1e-5, (precision, errors)


@pytest.mark.parametrize("name", ["FastEGNN", "FastRF"])
def test_untiled_beside_tiled_parts(make_store: MakeStore, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ranks then call collectives in autograd's order, others in ours: both orders are the same."""
    store, model = Store(make_store(3, "kmeans")), model_of(name, "model.tile=200")
    rows = store.parts_table.query("snapshot == 0").eval("4 * nodes + edges").sort_values().to_numpy() * 8
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", rows[1] / (200 * 64))
    cuts = [tiling.tiles_of(part, message_passing.TorchEngine(), 200, width=8) for part in read_parts(store, 0)]
    assert {cut.is_single_block for cut in cuts} == {True, False}
    assert_exact(store_differences(store, model, 0))


def test_without_the_exchange_the_comparison_fails(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: bridge mode, gradients that do not come back, rows that are not refreshed."""
    store, model = Store(make_store(2, "metis")), model_of("FastEGNN")
    bridge = [store.read(1, p) for p in range(2)]
    assert max(parallel_differences(model, store.whole(1, True), bridge).values()) > 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(halo.HaloExchange, "start_backward", lambda self, grads: lambda into: None)
        errors = store_differences(store, model, 1)
        assert errors["x"] <= TOLERANCE
        assert errors["embedding.weight"] > 1e-4
    start = halo.HaloExchange.start

    def stale(self: halo.HaloExchange, fields: halo.Fields) -> Callable[[], halo.Fields]:
        wait = start(self, fields)
        return lambda: {name: t if name == "x" else t * 0 for name, t in wait().items()}

    monkeypatch.setattr(halo.HaloExchange, "start", stale)
    assert store_differences(store, model, 1)["x"] > 1e-4


def random_graph(seed: int, n: int, edges: int) -> DGLGraph:
    """A random directed graph: neither edges nor halos need be symmetric."""
    draw = np.random.default_rng(seed)
    x = draw.random((n, 3))
    src, dst = draw.integers(0, n, (2, edges))
    pairs = np.unique(np.stack([dst, src])[:, src != dst], axis=1)
    nodes = {"x": x, "v": draw.normal(size=(n, 3)), "f": draw.random((n, 3)), "a": draw.random((n, 1)), "y": x + 0.1}
    graph = graphs.build_graph(pairs[1], pairs[0], {**nodes, "gid": np.arange(n)})
    graph.ndata["total"] = torch.full((n,), n)
    graph.ndata["centroid"] = torch.from_numpy(x.mean(0)).expand(n, 3).contiguous()
    return graph


def extract_parts(graph: DGLGraph, part: np.ndarray, parts: int) -> list[DGLGraph]:
    src, dst = (t.long().numpy() for t in graph.edges())
    result = []
    for rank in range(parts):
        own, inner_src, inner_dst, cross = halo.extract_part(src, dst, part, rank, parts, number=0, where="test")
        fields = {name: t[own] for name, t in graph.ndata.items()}
        extracted = graphs.build_graph(inner_src, inner_dst, fields)
        result.append(halo.attach(extracted, halo.Halos([cross], [len(own)])))
    return result


@given(seed=st.integers(0, 2**32 - 1), parts=st.integers(2, 5), more=st.integers(0, 25), edges=st.integers(0, 80))
@settings(max_examples=25)
def test_any_graph_and_any_parts(seed: int, parts: int, more: int, edges: int) -> None:
    draw = np.random.default_rng(seed)
    graph = random_graph(seed, parts + more, edges)
    part = draw.permutation(np.concatenate([np.arange(parts), draw.integers(0, parts, more)]))
    name = draw.choice(["EGNN", "FastRF", "FastEGNN", "TFN"])
    assert_exact(parallel_differences(model_of(name), graph, extract_parts(graph, part, parts)))


def test_isolated_nodes_and_parts() -> None:
    """A node whose neighbours are all on other ranks, a node without any, parts that need or serve no other."""
    part = np.array([0, 1, 1, 1, 0, 2, 2, 3, 3])
    # node 0 receives from part 1 only, node 4 from nobody; part 2 is isolated; nobody receives from part 3
    pairs = np.array([[1, 0], [2, 0], [3, 0], [0, 1], [2, 3], [5, 6], [6, 5], [0, 7], [4, 7], [0, 8]])
    whole = graphs.build_graph(pairs[:, 0], pairs[:, 1], dict(random_graph(1, 9, 0).ndata))
    parts = extract_parts(whole, part, 4)
    assert [halos_of(p).recv_counts for p in parts] == [[0, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    for name in ("FastEGNN", "SchNet"):
        assert_exact(parallel_differences(model_of(name), whole, parts))


@pytest.mark.usefixtures("small_tiles")
def test_one_exchange_per_layer_and_direction_of_the_needed_rows(make_store: MakeStore) -> None:
    store, model = Store(make_store(3, "metis")), model_of("FastEGNN", "model.tile=100")
    halo_nodes = store.parts_table.query("snapshot == 0")["halo"].tolist()
    parts = read_parts(store, 0)

    def two_steps(member: ThreadRank, copied: Any) -> tuple[list[Any], list[Any]]:
        step(copied, parts[member.rank], member)
        first, member.calls = member.calls, []
        step(copied, parts[member.rank], member)
        return first, member.calls

    width, layers, gradients = 8 + 3, 3, len(list(model.parameters()))  # width: H + 3
    calls = run_ranks(3, two_steps, model)
    for count, (first, second) in zip(halo_nodes, calls, strict=True):
        second = second[:-gradients]
        assert [kind for kind, _ in first[:3]] == ["exchange"] * 3  # link: counts, rows, positions
        assert [kind for kind, _ in first[3:-gradients]] == [kind for kind, _ in second]
        assert [kind for kind, _ in second] == ["exchange", "sum"] * layers + ["sum", "exchange"] * layers
        backward = [n for kind, n in second if kind == "exchange"][layers:]
        assert backward == [count * width] * (layers - 1) + [count * 8]  # the input positions need no gradient
    sent = sum(n for _, second in calls for _, n in second[: 2 * layers : 2])
    assert sent == sum(halo_nodes) * width * layers


def test_tiles_without_halo_nodes_run_during_the_exchange(make_store: MakeStore) -> None:
    events: list[str] = []

    class RecordingEngine(message_passing.TorchEngine):
        def mean(self, *args: Any, **options: Any) -> Any:
            events.append("block")
            return super().mean(*args, **options)

    class RecordingExchange(halo.HaloExchange):
        def start(self, fields: halo.Fields) -> Callable[[], halo.Fields]:
            events.append("start")
            rows = {name: torch.zeros(halos.size, t.shape[1]) for name, t in fields.items()}
            return lambda: events.append("wait") or rows  # type: ignore[func-returns-value]

        def start_backward(self, grads: halo.Fields) -> Callable[[halo.Fields], None]:
            events.append("start")
            return lambda into: events.append("wait")

    graph = Store(make_store(2, "bisection")).read(1, 0, True)
    halos = halos_of(graph)
    cut = tiling.tiles_of(graph, RecordingEngine(), 20, width=10**9)
    interior, boundary = (sum(len(tile.blocks) for tile in group) for group in (cut.interior, cut.boundary))
    assert min(interior, boundary) > 0
    layer = EGNNLayer(8, 2, 0)
    node = {name: torch.rand(graph.num_nodes(), w, requires_grad=True) for name, w in (("h", 8), ("x", 3), ("v", 3))}
    edge = {"e": torch.rand(graph.num_edges() + len(halos.src), 2)}
    exchange = RecordingExchange(comm.SingleProcess(), [], halos.recv_counts)
    out = tiled_layer.run_layer(layer, RecordingEngine(), cut, node, edge, {}, exchange)
    assert events == ["start", *["block"] * interior, "wait", *["block"] * boundary]
    events.clear()
    (out["h"].sum() + out["x"].sum()).backward()
    assert events == [*["block"] * boundary, "start", *["block"] * interior, "wait"]


def test_an_inconsistent_halo_is_refused_when_read(make_store: MakeStore) -> None:
    store = Store(make_store(2, "metis"))
    shard = store.snapshots.loc[1, "shard"]
    shard_part = store.source.part(shard, 0)
    right = shard_part.halo.clone()
    ours, other = store.first_ids[1].tolist()
    last = int(store.snapshots.index[store.snapshots["shard"] == shard][-1])
    assert last > 1  # so that the shard holds another snapshot
    lo = int((right < other).sum())  # the first halo node of the snapshot
    for wrong in (-1, 10**9, ours, int(store.first_ids[last, 1]), int(right[lo + 1])):
        shard_part.halo[lo] = wrong
        with pytest.raises(Failure, match=rf"snapshot 1, part 0: (halo node {wrong}|has \d+ halo).* `rm -r"):
            store.read(1, 0, True)
        store.read(1, 0)  # bridge mode does not use it
    shard_part.halo[:] = right
    store.read(1, 0, True)
    first, end, edges_lo, edges_hi = store.ranges[1, 0].tolist()
    cross = (shard_part.src[edges_lo:edges_hi] < first) | (shard_part.src[edges_lo:edges_hi] >= end)
    shard_part.src[edges_lo + int(cross.nonzero()[0])] = first  # a cross edge becomes an inner one
    with pytest.raises(Failure, match=r"snapshot 1, part 0: has \d+ cut_edges, parts.csv says \d+"):
        store.read(1, 0, True)


def link_after(store: Store, rank: int, change: Callable[[halo.Halo, list[DGLGraph]], object]) -> None:
    """Link the parts of snapshot 1 after a change of one rank's halo."""
    parts = read_parts(store, 1)
    change(halos_of(parts[rank]).parts[0], parts)
    run_ranks(len(parts), lambda member: halos_of(parts[member.rank]).link(parts[member.rank].ndata["x"], member))


def test_a_wrong_halo_node_and_ranks_with_different_data_are_refused(make_store: MakeStore) -> None:
    def replace_by_farthest(own: halo.Halo, parts: list[DGLGraph]) -> None:
        own.recv_rows[1][-1] = (parts[1].ndata["x"] - parts[0].ndata["x"].mean(0)).square().sum(1).argmax()
        own.recv_rows[1] = own.recv_rows[1].unique()

    with pytest.raises(
        Failure, match=r"snapshot 1, part 0: an edge .* beyond the radius 0.27.*`distegnn partition small"
    ):
        link_after(Store(make_store(2, "bisection")), 0, replace_by_farthest)
    store = Store(make_store(2, "metis"))
    link_after(store, 1, lambda own, _: None)
    different = r"snapshot \d, part \d: process \d reads snapshot .* data\.path"
    requests = r"snapshot 1, part 0: process 1 requests nodes .*`distegnn partition small"
    changes: list[tuple[Callable[[halo.Halo, Any], object], str]] = [
        (lambda own, _: setattr(own, "number", 0), different),
        (lambda own, _: operator.setitem(own.nodes, 0, own.nodes[0] + 1), different),
        (lambda own, _: own.recv_rows[0][-1:].fill_(10**6), requests),
        (lambda own, _: own.recv_rows[0][1:2].copy_(own.recv_rows[0][:1]), requests),
    ]
    for change, message in changes:
        with pytest.raises(Failure, match=message):
            link_after(store, 1, change)
    model = copy.deepcopy(model_of("FastEGNN"))
    model.requires_halo = True  # type: ignore[assignment]
    for graph in (dgl.batch([store.read(n, 0, True) for n in (0, 1)]), store.read(0, 0)):  # the halo was lost
        with pytest.raises(Failure, match=r"partition\.halo=exchange: .*halo"):
            model(graph)


class NotANetwork(torch.nn.Module):
    def __init__(self, **_: Any) -> None:
        super().__init__()


def test_invalid_settings_of_halo_mode_are_refused(make_store: MakeStore, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"partition\.halo=ghost: unknown"):
        config.load(None, ["partition.halo=ghost"])
    settings = config.load(None, [f"model.name={__name__}:NotANetwork", "partition.halo=exchange"])
    trainer.build_model(settings, (3, 1), comm.SingleProcess())
    with pytest.raises(Failure, match=r"partition\.halo=exchange .*partition\.halo=bridge"):
        trainer.build_model(settings, (3, 1), ThreadRank(0, Board(2)))
    (file := tmp_path / "config.yaml").touch()
    for model, mode, message in ((None, "exchange", "--halo .*--model"), (file, "ghost", "unknown")):
        with pytest.raises(Failure, match=message):
            cli.verify(make_store(2, "metis"), model, halo=mode)
