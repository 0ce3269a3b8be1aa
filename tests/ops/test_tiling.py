"""Tiles: cache, bounded memory, small graphs in one block, threads. Values of all models: test_models.py."""

from __future__ import annotations

import gc

import bench_data
import dgl
import pytest
import reference
import torch
from test_models import gradients, make_graph
from torch import Tensor

from dist_egnn.data import graphs
from dist_egnn.errors import Failure
from dist_egnn.models import network
from dist_egnn.ops import message_passing, tiled_layer, tiling


@pytest.fixture(autouse=True)
def tile_every_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 0)


def test_tiles_are_cut_again_when_edges_change() -> None:
    graph, model = make_graph(40, 1), network.EGNN(3, 2, hidden=8, tile=50).double()
    model(graph)
    graph.remove_edges(graph.edges("eid")[::2])
    assert torch.allclose(model(graph)[0], reference.egnn(model, graph)[0], atol=1e-12)


@pytest.mark.parametrize("nodes", [(0,), (5, 0), (0, 5)])
def test_a_snapshot_without_nodes_is_refused(nodes: tuple[int, ...]) -> None:
    graph = dgl.batch([make_graph(5, 1).subgraph(list(range(n))) for n in nodes])
    with pytest.raises(Failure, match=r"no node .* fewer parts"):
        network.FastEGNN(3, 2, hidden=8).double()(graph)


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = network.EGNN(3, 2, hidden=8, tile=10).double(), make_graph(50, 1)
    monkeypatch.setattr(model.layers[0], "message", lambda edges: 1 / 0)
    with tiled_layer.tile_threads(2), pytest.raises(ZeroDivisionError):
        model(graph)


def test_a_tile_is_freed_without_the_garbage_collector() -> None:
    """No cycle of references keeps the arrays of a backward pass: it would double the memory of a step."""
    model, graph = network.FastEGNN(3, 2, hidden=8, tile=50).double(), make_graph(40, 1)

    def tiles() -> int:
        return sum(type(o) is tiled_layer._Leaves for o in gc.get_objects())

    gc.collect()
    before = tiles()  # of other tests
    gc.disable()
    try:
        model(graph)[0].sum().backward()
        assert tiles() == before
    finally:
        gc.enable()


def test_memory_of_a_backward_pass_is_one_tile() -> None:
    """Tiled, autograd saves a layer's inputs; untiled, arrays of E rows."""
    graph = make_graph(400, 1, radius=0.3)

    def saved_bytes(tile: int) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network.FastEGNN(3, 2, hidden=16, tile=tile, engine="torch").double()(graph)
        return sum(sizes.values())

    assert graph.num_edges() > 20 * graph.num_nodes()
    assert saved_bytes(500) < saved_bytes(10**9) / 8


@pytest.mark.parametrize("width", [64, 16])
def test_a_graph_of_few_blocks_becomes_one(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MAX_UNTILED_BLOCKS", 2)
    graph, engine = make_graph(40, 1), message_passing.TorchEngine()
    rows = graph.num_edges() + tiling.EDGES_PER_NODE * 40
    needed = -(-rows * width // (2 * tiling.USUAL_WIDTH))
    assert tiling.tiles_of(graph, engine, needed, width=width).is_single_block
    assert not tiling.tiles_of(graph, engine, needed - 1, width=width).is_single_block


@pytest.mark.parametrize(("name", "threads"), [("FastEGNN", 2), ("FastEGNN", 3), ("FastTFN", 2)])
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_any_number_of_threads_gives_the_same_bits(name: str, threads: int, engine: str) -> None:
    if "TFN" in name:
        pytest.importorskip("e3nn")
    graph = dgl.batch([make_graph(50, 1), make_graph(35, 3)])
    model = network.model_class(name)(3, 2, hidden=16, tile=10, engine=engine)
    graph.ndata.update({key: value.float() for key, value in graph.ndata.items() if value.is_floating_point()})
    expected, expected_gradients = model(graph)[0], gradients(model, graph)
    with tiled_layer.tile_threads(threads):
        assert torch.equal(model(graph)[0], expected)
        assert all(torch.equal(value, expected_gradients[key]) for key, value in gradients(model, graph).items())
        with torch.inference_mode():
            assert torch.equal(model(graph)[0], expected)


@pytest.mark.parametrize(("grad", "arrays"), [(False, 3), (True, 6)])  # h, x and x; with m, dx and dx
def test_means_are_saved_only_for_a_backward_pass(grad: bool, arrays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the arrays of N rows that the layers make."""
    x = bench_data.block(1000)
    graph = graphs.build_graph(*graphs.radius_edges(x, 0.0763), bench_data.node_fields(x))
    model = network.EGNN(features=3, node_attributes=2, hidden=8, layers=2, tile=256)
    rows, new_empty = [], Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **more: (rows.append(args[1]), new_empty(*args, **more))[1])
    with torch.set_grad_enabled(grad):
        model(graph)
    assert rows == [1000] * arrays


def test_gradients_of_edge_fields_are_in_the_graphs_order() -> None:
    results = []
    for tile in (20, 10**9):
        graph = make_graph(40, 1)
        e = graph.edata["e"].requires_grad_()
        torch.manual_seed(0)
        network.FastEGNN(3, 2, hidden=8, tile=tile).double()(graph)[0].square().sum().backward()
        results.append(e.grad)
    assert float(results[0].abs().max()) > 0
    assert torch.allclose(*results, atol=1e-13)


@pytest.mark.parametrize(("sources", "dtype"), [(300, torch.int16), (2**15, torch.int32)])
def test_indices_of_a_block_take_the_smallest_type(sources: int, dtype: torch.dtype) -> None:
    src = torch.tensor([sources - 1, 0, sources - 1], dtype=torch.int32)
    block = message_passing.TorchEngine().block(src, torch.tensor([0, 0, 1], dtype=torch.int32), sources, 2)
    assert {index.dtype for index in vars(block).values()} == {dtype}
    assert block.src.tolist() == src.tolist()
    assert block.dst.tolist() == [0, 0, 1]
    assert block.sum_to_src(torch.tensor([[1.0], [2.0], [4.0]]))[[0, -1]].tolist() == [[2.0], [5.0]]
