"""Offloaded activations give the same gradients and leave no file behind."""

from __future__ import annotations

import contextlib
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
from dist_egnn.ops.activation_offload import offload_to_disk


@pytest.fixture(scope="module")
def graph():
    x = bench_data.block(3000)
    return graphs.build_graph(*graphs.radius_edges(x, 0.0763), bench_data.node_fields(x))


@pytest.fixture(autouse=True)
def offload_small_tensors(monkeypatch):
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1 << 10)


def open_files(folder: Path) -> int:
    """How many of this process's open files lie in ``folder``: other tests' files may close at any time."""
    gc.collect()
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(link.startswith(f"{folder}/") for link in links)


@pytest.mark.parametrize("name", ["FastEGNN", "SchNet"])
@pytest.mark.parametrize("tile", [512, 10**9])  # many tiles, and one block under plain autograd
def test_gradients_are_the_same_bits(graph, tmp_path, name, tile):
    torch.manual_seed(0)
    model = network.model_class(name)(features=3, node_attributes=2, hidden=8, layers=3, tile=tile)
    results, files = [], []
    for folder, in_memory in (("", []), (str(tmp_path), []), (str(tmp_path), [graph.edata["e"]])):
        with offload_to_disk(folder, in_memory):
            predicted = model(graph)[0]
        files.append(open_files(tmp_path))
        assert not list(tmp_path.iterdir())  # files without names
        model.zero_grad()
        torch.nn.functional.mse_loss(predicted, graph.ndata["y"]).backward()
        results.append([predicted.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        del predicted  # with its files
        assert open_files(tmp_path) == 0
    if tile == 512:
        assert 0 == files[0] < files[2] == files[1] - 1  # the graph's own field stays in memory
    assert len(results[0]) > 10
    for in_memory, *offloaded in zip(*results, strict=True):
        assert all(torch.equal(in_memory, each) for each in offloaded)


def test_files_are_closed_with_the_autograd_graph(graph, tmp_path):
    model = network.EGNN(features=3, node_attributes=2, hidden=8, layers=2, tile=512)
    with offload_to_disk(str(tmp_path)):
        predicted = model(graph)[0]
    assert open_files(tmp_path) > 0
    del predicted
    assert open_files(tmp_path) == 0


def test_memory_at_the_same_address_is_another_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)
    w = torch.ones(1, requires_grad=True)
    memory, outs = bytearray(4 * 64), []
    with offload_to_disk(str(tmp_path)):
        for k in range(5):
            value = torch.frombuffer(memory, dtype=torch.float32)
            value.numpy()[:] = k  # unseen by torch
            outs.append((w * value).sum())
            del value
    for k, out in enumerate(outs):
        w.grad = None
        out.backward()
        assert w.grad is not None
        assert w.grad.item() == 64 * k


def test_a_missing_folder_is_named(graph, tmp_path: Path):
    model = network.EGNN(features=3, node_attributes=2, hidden=8, layers=2)
    with pytest.raises(Failure, match=r"missing.*choose another folder"), offload_to_disk(str(tmp_path / "missing")):
        model(graph)
    with pytest.raises(Failure, match=r"train\.kept=.*missing.*create it"):
        activation_offload.check_folder(str(tmp_path / "missing"), "train.kept=")
