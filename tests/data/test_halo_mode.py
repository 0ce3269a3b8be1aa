"""Halo mode on ranks that are threads: P parts are the full graph, whatever the model, partition, engine, graph; bad halos."""

from __future__ import annotations

import copy
import functools
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
from together import Board, Member, differences, step, together

from dist_egnn import cli, config
from dist_egnn.data import dataset, graphs, halo
from dist_egnn.data.store import Store
from dist_egnn.distributed import comm
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_check
from dist_egnn.models import network
from dist_egnn.models.egnn import EGNNLayer
from dist_egnn.ops import message_passing, tiling
from dist_egnn.train import trainer

TOLERANCE = parallel_check.TOLERANCE
Make = Callable[..., Path]


@functools.cache
def model_of(name: str, *keys: str, widths: tuple[int, int] = (3, 1), double: bool = True) -> torch.nn.Module:
    settings = config.load(None, [f"model.name={name}", "model.hidden=8", "model.layers=3", "data.radius=0.27", *keys])
    model = trainer.build_model(settings, widths, comm.Alone())
    model = model.double() if double else model
    parallel_check.randomize_output_weights(model)
    return model


def apart(store: Store, model: torch.nn.Module, *snapshots: int) -> dict[str, float]:
    """Differences of the store's parts in halo mode from the full graph, on a batch of snapshots."""

    parts = [
        halo.batch([store.read(n, p, True) for n in snapshots]) for p in range(store.parts)
    ]  # no store is for threads
    whole = dgl.batch([store.whole(n, True) for n in snapshots])
    first = np.cumsum([0, *(store.whole(n).num_nodes() for n in snapshots)])
    gid = [torch.cat([g.ndata["gid"] + f for g, f in zip(dgl.unbatch(part), first, strict=False)]) for part in parts]
    return differences(
        step(model, whole, comm.Alone()),
        together(store.parts, lambda member, copied: step(copied, parts[member.rank], member), model),
        gid,
    )


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("name", network.NAMES)
def test_parts_are_the_full_graph(make_store: Make, name: str, parts: int) -> None:
    found = apart(Store(make_store(parts, "metis")), model_of(name), 1)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("name", ["FastEGNN", "RF", "FastTFN"])
@pytest.mark.parametrize("method", [m for m in assign.METHODS if m != "metis"])
def test_however_nodes_are_assigned(make_store: Make, name: str, method: str) -> None:
    found = apart(Store(make_store(3, method)), model_of(name), 0)
    assert max(found.values()) <= TOLERANCE, found


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "WHOLE", 0)


OPTIONS = ("model.attention=true", "model.normalize=true", "model.gravity=[0, 0, -1]")


@pytest.mark.parametrize("kind", ["dgl", "torch"])
@pytest.mark.parametrize("keys", [(), OPTIONS], ids=["plain", "options"])
@pytest.mark.usefixtures("small_tiles")
def test_many_tiles_and_batches(make_store: Make, kind: str, keys: tuple[str, ...]) -> None:
    store = Store(make_store(3, "metis"))
    found = apart(store, model_of("FastEGNN", *keys, f"model.engine={kind}", "model.tile=100"), 0, 3, 1)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.usefixtures("small_tiles")
def test_in_float32_and_with_messages_in_bfloat16(make_store: Make) -> None:
    store = Store(make_store(2, "random"))
    for precision in ("float32", "bf16-messages"):
        found = apart(store, model_of("FastEGNN", f"model.precision={precision}", "model.tile=200", double=False), 1)
        # of sums of many gradients that cancel, less is left in bfloat16
        assert max(found[name] for name in ("x", "z", "s", "embedding.weight")) <= 1e-5, (precision, found)


def test_threads_share_the_tiles_of_a_part(make_store: Make, small_tiles: None) -> None:
    store, model = Store(make_store(2, "metis")), model_of("FastEGNN", "model.tile=50")
    torch.set_num_threads(2)
    try:
        found = apart(store, model, 1)
    finally:
        torch.set_num_threads(1)
    assert max(found.values()) <= TOLERANCE, found


def test_without_the_exchange_the_numbers_are_others(make_store: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons can fail: rows that are not refreshed, gradients that do not come back, edges of the bridge mode alone."""
    store, model = Store(make_store(2, "metis")), model_of("FastEGNN")
    whole, parts = store.whole(1, True), [store.read(1, p) for p in range(2)]
    rows = [part.ndata["gid"] for part in parts]
    bridge = together(2, lambda member, copied: step(copied, parts[member.rank], member), model)
    assert max(differences(step(model, whole, comm.Alone()), bridge, rows).values()) > 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(halo.HaloExchange, "start_backward", lambda self, grads: lambda into: None)
        found = apart(store, model, 1)
        assert found["x"] <= TOLERANCE
        assert found["embedding.weight"] > 1e-4
    start = halo.HaloExchange.start

    def stale(self: halo.HaloExchange, fields: halo.Fields) -> Callable[[], halo.Fields]:
        wait = start(self, fields)
        return lambda: {name: t if name == "x" else t * 0 for name, t in wait().items()}

    monkeypatch.setattr(halo.HaloExchange, "start", stale)
    assert apart(store, model, 1)["x"] > 1e-4


# any graph, any parts


def sample(seed: int, n: int, edges: int) -> DGLGraph:
    """A random directed graph: edges need not be symmetric, as a halo's need not."""
    draw = np.random.default_rng(seed)
    x = draw.random((n, 3))
    src, dst = draw.integers(0, n, (2, edges))
    pairs = np.unique(np.stack([dst, src])[:, src != dst], axis=1)
    nodes = {"x": x, "v": draw.normal(size=(n, 3)), "f": draw.random((n, 3)), "a": draw.random((n, 1)), "y": x + 0.1}
    graph = graphs.build_graph(pairs[1], pairs[0], {**nodes, "gid": np.arange(n)})
    graph.ndata["total"] = torch.full((n,), n)
    graph.ndata["centroid"] = torch.from_numpy(x.mean(0)).expand(n, 3).contiguous()
    return graph


def pieces(graph: DGLGraph, part: np.ndarray, parts: int) -> list[DGLGraph]:
    src, dst = (t.long().numpy() for t in graph.edges())
    found = []
    for rank in range(parts):
        own, near, to, beyond = halo.extract_part(src, dst, part, rank, parts, number=0, where="test")
        piece = graphs.build_graph(near, to, {name: t[own] for name, t in graph.ndata.items()})
        found.append(halo.attach(piece, halo.Halos([beyond], [len(own)])))
    return found


def apart_in_pieces(graph: DGLGraph, part: np.ndarray, parts: int, model: torch.nn.Module) -> dict[str, float]:
    cut = pieces(graph, part, parts)
    many = together(parts, lambda member, copied: step(copied, cut[member.rank], member), model)
    return differences(step(model, graph, comm.Alone()), many, [piece.ndata["gid"] for piece in cut])


@given(
    seed=st.integers(0, 2**32 - 1),
    parts=st.integers(2, 5),
    more=st.integers(0, 25),
    edges=st.integers(0, 80),
    name=st.sampled_from(["EGNN", "FastRF", "FastEGNN", "TFN"]),
)
@settings(max_examples=25)
def test_any_graph_and_any_parts(seed: int, parts: int, more: int, edges: int, name: str) -> None:
    draw = np.random.default_rng(seed)
    graph = sample(seed, parts + more, edges)
    part = draw.permutation(np.concatenate([np.arange(parts), draw.integers(0, parts, more)]))
    found = apart_in_pieces(graph, part, parts, model_of(name))
    assert max(found.values()) <= TOLERANCE, found


def test_nodes_and_parts_that_are_cut_off() -> None:
    """A node whose neighbours all live elsewhere, a node without any, a part that needs nothing, one that is needed by nobody."""
    n, part = 9, np.array([0, 1, 1, 1, 0, 2, 2, 3, 3])
    draw = np.random.default_rng(0)
    graph = sample(1, n, 0)
    #       node 0 hears part 1 alone; node 4 nobody; part 2 is an island; part 3 hears part 0, nobody hears it
    pairs = np.array([[1, 0], [2, 0], [3, 0], [0, 1], [2, 3], [5, 6], [6, 5], [0, 7], [4, 7], [0, 8]])
    whole = graphs.build_graph(
        pairs[:, 0], pairs[:, 1], {**graph.ndata, "v": torch.from_numpy(draw.normal(size=(n, 3)))}
    )
    wanted = [[0, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    for rank, piece in enumerate(pieces(whole, part, 4)):
        halos = halo.get(piece)
        assert halos is not None
        assert halos.recv_counts == wanted[rank]
    for name in ("FastEGNN", "SchNet"):
        found = apart_in_pieces(whole, part, 4, model_of(name))
        assert max(found.values()) <= TOLERANCE, (name, found)


# what is sent, and when


def test_one_call_a_layer_and_direction_of_the_rows_that_are_needed(make_store: Make, small_tiles: None) -> None:
    store, model = Store(make_store(3, "metis")), model_of("FastEGNN", "model.tile=100")
    listed = store.parts_table.query("snapshot == 0")["halo"].tolist()

    parts = [store.read(0, p, True) for p in range(3)]

    def one(member: Member, copied: Any) -> tuple[list[Any], list[Any]]:
        graph = parts[member.rank]
        step(copied, graph, member)
        first = list(member.calls)
        member.calls.clear()
        step(copied, graph, member)
        return first, member.calls

    width, layers = 8 + 3, 3  # H + 3
    found = together(3, one, model)
    for rank, (first, then) in enumerate(found):
        gradients = [("sum", p.numel()) for p in model.parameters()]
        exchanges = [n for kind, n in then[: -len(gradients)] if kind == "exchange"]
        assert [kind for kind, _ in first[:3]] == ["exchange"] * 3  # what is wanted, which rows, their positions: once
        assert [call[0] for call in first[3:]] == [call[0] for call in then]
        assert [kind for kind, _ in then[: -len(gradients)]] == ["exchange", "sum"] * layers + [
            "sum",
            "exchange",
        ] * layers
        back = [listed[rank] * width] * (layers - 1) + [listed[rank] * 8]  # the input's positions need no gradient
        assert exchanges[layers:] == back
    sent = sum(n for _, then in found for kind, n in then[:6:2])
    assert sent == sum(listed) * width * layers


def test_tiles_without_halo_nodes_run_while_rows_travel(make_store: Make) -> None:
    events: list[str] = []

    class Noted(message_passing.TorchEngine):
        def mean(self, *args: Any) -> Any:
            events.append("block")
            return super().mean(*args)

    class Slow(halo.HaloExchange):
        def start(self, fields: halo.Fields) -> Callable[[], halo.Fields]:
            events.append("start")
            rows = {name: torch.zeros(halos.size, t.shape[1]) for name, t in fields.items()}
            return lambda: events.append("wait") or rows  # type: ignore[func-returns-value]

        def start_backward(self, grads: halo.Fields) -> Callable[[halo.Fields], None]:
            events.append("start")
            return lambda into: events.append("wait")

    graph = Store(make_store(2, "bisection")).read(1, 0, True)
    halos = halo.get(graph)
    assert halos is not None
    cut = tiling.cut(graph, Noted(), 20, width=10**9)
    interior, boundary = (sum(len(tile.blocks) for tile in group) for group in cut.groups)
    assert interior
    assert boundary
    layer = EGNNLayer(8, 2, 0)
    node = {name: torch.rand(graph.num_nodes(), w, requires_grad=True) for name, w in (("h", 8), ("x", 3), ("v", 3))}
    edge = {"e": torch.rand(graph.num_edges() + len(halos.src), 2)}
    out = tiling.run(layer, Noted(), cut, node, edge, {}, Slow(comm.Alone(), [], halos.recv_counts))
    assert events == ["start", *["block"] * interior, "wait", *["block"] * boundary]
    events.clear()
    (out["h"].sum() + out["x"].sum()).backward()
    assert events == [*["block"] * boundary, "start", *["block"] * interior, "wait"]


# halos that are wrong


def test_halo_nodes_that_cannot_be_are_refused_at_reading(make_store: Make) -> None:
    store = Store(make_store(2, "metis"))
    shard = store.snapshots.loc[1, "shard"]
    held = store.source.part(shard, 0)
    right = held.halo.clone()
    ours, other = int(store._first[1, 0]), int(store._first[1, 1])
    (last,) = {int(store.snapshots.index[store.snapshots["shard"] == shard][-1])}
    assert last > 1  # so that the shard holds another snapshot
    lo = int((right < other).sum())  # the snapshot's halo nodes begin here
    for wrong in (-1, 10**9, ours, int(store._first[last, 1])):
        held.halo[:] = right
        held.halo[lo] = wrong
        with pytest.raises(Failure, match=rf"snapshot 1, part 0: its halo node {wrong} is no other part's node of it"):
            store.read(1, 0, True)
        store.read(1, 0)  # nothing to a bridge
    held.halo[:] = right
    held.halo[lo] = held.halo[lo + 1]
    with pytest.raises(Failure, match=r"snapshot 1, part 0: has \d+ halo, parts.csv says \d+"):
        store.read(1, 0, True)
    held.halo[:] = right
    store.read(1, 0, True)
    first, after, elo, ehi = store.ranges[1, 0].tolist()
    away = (held.src[elo:ehi] < first) | (held.src[elo:ehi] >= after)
    held.src[elo + int(away.nonzero()[0])] = first  # an edge from another part has become one from its own
    with pytest.raises(Failure, match=r"snapshot 1, part 0: has \d+ cut_edges, parts.csv says \d+"):
        store.read(1, 0, True)


def test_a_halo_node_that_is_another_is_refused_by_its_distance(make_store: Make) -> None:
    store = Store(make_store(2, "bisection"))

    parts = [store.read(1, p, True) for p in range(2)]

    def one(member: Member, copied: Any) -> None:
        graph = parts[member.rank]
        halos = halo.get(graph)
        assert halos is not None
        if member.rank == 0:
            x = parts[1].ndata["x"]
            far = int((x - graph.ndata["x"].mean(0)).square().sum(1).argmax())
            rows = halos.parts[0].recv_rows[1]
            rows[-1] = far
            halos.parts[0].recv_rows[1] = rows.unique()
        step(copied, graph, member)

    with pytest.raises(Failure, match=r"snapshot 1, part 0: an edge from another part is .* beyond the radius 0.27"):
        together(2, one, model_of("EGNN"))


def linked(store: Store, change: Callable[[halo.Halo], None]) -> None:
    """Link the parts of snapshot 1 after a change of part 1's halo."""

    parts = [store.read(1, p, True) for p in range(store.parts)]

    def one(member: Member) -> None:
        graph = parts[member.rank]
        halos = halo.get(graph)
        assert halos is not None
        if member.rank == 1:
            change(halos.parts[0])
        halos.link(graph.ndata["x"], member)

    together(store.parts, one)


def test_ranks_that_mean_different_data_find_out(make_store: Make) -> None:
    store = Store(make_store(2, "metis"))
    linked(store, lambda one: None)

    def other_snapshot(one: halo.Halo) -> None:
        one.number = 0

    def other_size(one: halo.Halo) -> None:
        one.nodes[0] += 1

    def no_such_node(one: halo.Halo) -> None:
        one.recv_rows[0][-1] = 10**6

    def twice(one: halo.Halo) -> None:
        one.recv_rows[0][1] = one.recv_rows[0][0]

    for change in (other_snapshot, other_size):
        with pytest.raises(Failure, match=r"snapshot \d, part \d: process \d is at snapshot .* give all the same"):
            linked(store, change)
    for change in (no_such_node, twice):
        with pytest.raises(Failure, match=r"snapshot 1, part 0: process 1 asks for nodes that are none of its \d+"):
            linked(store, change)


def test_a_lost_halo_is_refused(make_store: Make) -> None:
    store, model = Store(make_store(2, "metis")), copy.deepcopy(model_of("FastEGNN"))
    model.exchange = True  # type: ignore[assignment]
    with pytest.raises(Failure, match="the graph has lost its halo"):
        model(dgl.batch([store.read(n, 0, True) for n in (0, 1)]))
    with pytest.raises(Failure, match="the graph has lost its halo"):
        model(store.read(0, 0))


class Own(torch.nn.Module):
    def __init__(self, **_: Any) -> None:
        super().__init__()


def test_what_halo_mode_is_not_for() -> None:
    with pytest.raises(Failure, match=r"partition.halo=ghost: unknown; use bridge or exchange"):
        config.load(None, ["partition.halo=ghost"])
    settings = config.load(None, [f"model.name={__name__}:Own", "partition.halo=exchange"])
    trainer.build_model(settings, (3, 1), comm.Alone())
    with pytest.raises(Failure, match=r"partition.halo=exchange is for models.Network"):
        trainer.build_model(settings, (3, 1), Member(0, Board(2)))


def test_the_commands_that_know_of_it(make_store: Make, tmp_path: Path) -> None:
    path = make_store(2, "metis")
    with pytest.raises(Failure, match=r"--snapshot, --halo and config keys are .* name its config with --model"):
        cli.verify(path, halo="exchange")
    file = tmp_path / "config.yaml"
    file.write_text("data: {radius: 0.27}\n")
    with pytest.raises(Failure, match=r"partition.halo=ghost: unknown"):
        cli.verify(path, file, halo="ghost")


def test_ranks_keep_the_same_samples(make_store: Make) -> None:
    """They link together, so none may forget a sample that another still has."""
    path, budget = make_store(3, "kmeans"), 200_000
    settings = config.load(None, [f"data.path={path}", "data.radius=0.27", "data.horizon=3", "data.frames=3"])
    settings.data.features, settings.data.node_attributes = ["mass", "viscosity/max", "speed"], ["mass"]
    settings.partition.halo = "exchange"
    kept = []
    for rank in range(3):
        read = dataset.open_dataset(settings, rank, 3)
        read._budget = budget
        for number in (0, 1, 2, 0, 3, 4, 1):
            read[number]
        kept.append(list(read._kept))
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) < 5


@pytest.mark.parametrize("name", ["FastEGNN", "FastRF"])
def test_parts_in_one_piece_beside_parts_in_tiles(make_store: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks then make their calls by autograd's order, or by ours: the same."""
    store, model = Store(make_store(3, "kmeans")), model_of(name, "model.tile=200")
    rows = store.parts_table.query("snapshot == 0").eval("4 * nodes + edges").sort_values().to_numpy() * 8
    monkeypatch.setattr(tiling, "WHOLE", rows[1] / (200 * 64))
    cuts = [tiling.cut(store.read(0, rank, True), message_passing.choose("auto"), 200, width=8) for rank in range(3)]
    assert {cut.whole for cut in cuts} == {True, False}
    found = apart(store, model, 0)
    assert max(found.values()) <= TOLERANCE, found
