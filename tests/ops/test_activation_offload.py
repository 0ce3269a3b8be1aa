"""What a forward pass keeps on disk gives the gradients that it gives in memory, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import bench_data
import pytest
import torch

from dist_egnn.data import graphs
from dist_egnn.errors import Failure
from dist_egnn.models import network
from dist_egnn.ops import activation_offload


@pytest.fixture(scope="module")
def graph():
    x = bench_data.block(3000)
    return graphs.build_graph(*graphs.radius_edges(x, 0.0763), bench_data.node_fields(x))


@pytest.mark.parametrize("name", ["FastEGNN", "SchNet"])
@pytest.mark.parametrize("tile", [512, 10**9])  # many tiles, and one under plain autograd
def test_gradients_are_the_same_bits(graph, tmp_path, monkeypatch, name, tile):
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1 << 10)
    written: list[int] = []
    plain = activation_offload._TensorFile.__init__
    monkeypatch.setattr(
        activation_offload._TensorFile, "__init__", lambda *given: (plain(*given), written.append(1))[0]
    )
    torch.manual_seed(0)
    model = network.model_class(name)(features=3, node_attributes=2, edge_attributes=2, hidden=8, layers=3, tile=tile)
    found, files = [], []
    for folder, besides in (("", []), (str(tmp_path), []), (str(tmp_path), [graph.edata["e"]])):
        written.clear()
        with activation_offload.offload_to_disk(folder, besides):
            predicted, _ = model(graph)
        files.append(len(written))
        assert not list(tmp_path.iterdir())  # files without names
        model.zero_grad()
        torch.nn.functional.mse_loss(predicted, graph.ndata["y"]).backward()
        found.append([predicted.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    if tile == 512:
        assert 0 == files[0] < files[2] == files[1] - 1  # the graph's own field stays where it is
    assert len(found[0]) > 10
    for each in zip(*found, strict=True):
        assert torch.equal(each[0], each[1])
        assert torch.equal(each[0], each[2])


def test_memory_at_the_same_address_is_another_tensor(tmp_path, monkeypatch):
    """A freed tensor's place is taken by the next; each must come back as it was."""
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)
    w = torch.ones(1, requires_grad=True)
    memory, outs = bytearray(4 * 64), []
    with activation_offload.offload_to_disk(str(tmp_path)):
        for k in range(5):
            value = torch.frombuffer(memory, dtype=torch.float32)
            value.numpy()[:] = k  # torch does not see it
            outs.append((w * value).sum())
            del value
    for k, out in enumerate(outs):
        w.grad = None
        out.backward()
        assert w.grad is not None
        assert w.grad.item() == 64 * k


def test_files_are_closed_with_the_graph(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1 << 10)
    model = network.EGNN(features=3, node_attributes=2, edge_attributes=2, hidden=8, layers=2, tile=512)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with activation_offload.offload_to_disk(str(tmp_path)):
        predicted, _ = model(graph)
    assert len(os.listdir("/proc/self/fd")) > before
    del predicted
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_is_not_there_is_named(graph, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1 << 10)
    model = network.EGNN(features=3, node_attributes=2, edge_attributes=2, hidden=8, layers=2)
    with (
        pytest.raises(Failure, match=r"missing.*choose another folder"),
        activation_offload.offload_to_disk(str(tmp_path / "missing")),
    ):
        model(graph)
