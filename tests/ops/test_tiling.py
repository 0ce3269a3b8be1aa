"""Tiles: cut again when edges change, bounded memory, small graphs in one piece, threads. Any model's values: test_models.py."""

from __future__ import annotations

import bench_data
import dgl
import pytest
import reference
import torch
from test_models import assert_close, gradients, make_graph
from torch import Tensor

from dist_egnn.data import graphs
from dist_egnn.models import network
from dist_egnn.ops import message_passing, tiling


@pytest.fixture(autouse=True)
def no_graph_is_too_small_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)


def test_tiles_are_cut_again_when_edges_change() -> None:
    graph, model = make_graph(40, 1), network.EGNN(3, 2, hidden=8, tile=50).double()
    model(graph)
    graph.remove_edges(graph.edges("eid")[::2])
    x, _ = model(graph)
    assert torch.allclose(x, reference.egnn(model, graph)[0], atol=1e-12)


def test_memory_of_a_backward_pass_is_one_tile() -> None:
    """Tiled, autograd keeps a layer's inputs; untiled, arrays of E rows."""
    graph = make_graph(400, 1, radius=0.3)

    def kept(tile: int) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network.FastEGNN(3, 2, hidden=16, tile=tile).double()(graph)
        return sum(sizes.values())

    assert graph.num_edges() > 20 * graph.num_nodes()
    assert kept(500) < kept(10**9) / 8


def test_a_graph_of_few_blocks_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 2)
    graph = make_graph(40, 1)
    rows = graph.num_edges() + tiling.EDGES_PER_NODE * 40
    for width in (64, 16):
        needed = -(-rows * width // (2 * 64))
        assert tiling.tiles_of(graph, message_passing.resolve_engine("auto"), needed, width=width).is_single_block
        assert not tiling.tiles_of(
            graph, message_passing.resolve_engine("auto"), needed - 1, width=width
        ).is_single_block


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_tiles(threads: int) -> None:
    graph = dgl.batch([make_graph(50, 1), make_graph(35, 3)])
    model = network.FastEGNN(3, 2, hidden=8, tile=20).double()
    wanted, found = model(graph)[0], gradients(model, graph)
    torch.set_num_threads(threads)
    try:
        first, again = model(graph)[0], model(graph)[0]
        assert torch.equal(first, again)  # a share of the tiles is fixed
        assert torch.allclose(first, wanted, atol=1e-13)
        assert_close(gradients(model, graph), found, 1e-12)
        with torch.inference_mode():
            assert torch.allclose(model(graph)[0], wanted, atol=1e-13)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


def test_without_gradients_no_means_are_kept(monkeypatch):
    """Arrays of N rows that layers make: each layer's outputs, and its means only where a backward pass may follow."""
    x = bench_data.block(1000)
    graph = graphs.build_graph(*graphs.radius_edges(x, 0.0763), bench_data.node_fields(x))
    model = network.EGNN(features=3, node_attributes=2, edge_attributes=2, hidden=8, layers=2, tile=256)
    made = []
    plain = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *given, **more: (made.append(given[1]), plain(*given, **more))[1])
    for recorded, expected in ((False, 3), (True, 6)):  # h, x and x; with m, dx and dx
        made.clear()
        with torch.set_grad_enabled(recorded):
            model(graph)
        assert made == [1000] * expected


def test_gradients_of_edge_fields_come_in_the_graphs_order() -> None:
    found = []
    for tile in (20, 10**9):
        graph = make_graph(40, 1)
        e = graph.edata["e"].requires_grad_()
        torch.manual_seed(0)
        network.FastEGNN(3, 2, hidden=8, tile=tile).double()(graph)[0].square().sum().backward()
        found.append(e.grad)
    assert float(found[0].abs().max()) > 0
    assert torch.allclose(*found, atol=1e-13)


@pytest.mark.parametrize(("sources", "dtype"), [(300, torch.int16), (2**15, torch.int32)])
def test_a_block_counts_as_far_as_it_must(sources: int, dtype: torch.dtype) -> None:
    src = torch.tensor([sources - 1, 0, sources - 1], dtype=torch.int32)
    block = message_passing.TorchEngine().block(src, torch.tensor([0, 0, 1], dtype=torch.int32), sources, 2)
    assert {index.dtype for index in vars(block).values()} == {dtype}
    assert block.src.tolist() == src.tolist()
    assert block.dst.tolist() == [0, 0, 1]
    assert block.sum_to_src(torch.tensor([[1.0], [2.0], [4.0]]))[[0, -1]].tolist() == [[2.0], [5.0]]
