"""`train.device`: names, errors, and the devices of all tensors of a training step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dgl
import pandas as pd
import pytest
import torch
from small_data import DATA
from test_models import make_graph

from dist_egnn import config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.data import dataset
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.models import network
from dist_egnn.ops import message_passing
from dist_egnn.train import losses, trainer
from dist_egnn.train.state import TrainingState
from dist_egnn.utils import devices

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch sees none")


def settings(path: Path, *overrides: str) -> config.Config:
    data = [f"data.{key}={value}" for key, value in DATA.items() if key != "frames"]
    return config.load(None, [f"data.path={path}", *data, "data.frames=2", "train.batch_size=2", *overrides])


def set_device_count(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let torch report ``count`` CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


DEVICES = [(0, "cpu", 1, "cpu"), (2, "cpu", 1, "cpu"), (0, "auto", 1, "cpu"), (2, "auto", 0, "cuda:0")]
DEVICES += [(2, "auto", 3, "cuda:1"), (2, "cuda", 3, "cuda:1"), (2, "cuda:1", 2, "cuda:1")]


def test_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, name, rank, device in DEVICES:
        set_device_count(monkeypatch, count)
        assert devices.resolve(name, rank) == torch.device(device)


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (1, "cuda:1")])
def test_a_missing_device_or_dgl_without_cuda_is_refused_before_any_work(tmp_path, monkeypatch, small, count, name):
    set_device_count(monkeypatch, count)
    run = tmp_path / "run"
    chosen = settings(small, f"train.device={name}", "partition.parts=2", f"run.dir={run}")
    error = rf"train\.device={name}: .* {count} CUDA .*train\.device=cpu$"
    with pytest.raises(Failure, match=f"^{error}"):
        run_training(chosen)
    assert list(tmp_path.iterdir()) == []
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml(chosen))
    with pytest.raises(Failure, match=rf"config\.yaml: {error}"):
        run_evaluation(run)
    assert [f.name for f in run.iterdir()] == ["config.yaml"]
    monkeypatch.setattr(message_passing, "dgl_supports", lambda device: False)
    set_device_count(monkeypatch, 1)
    with pytest.raises(Failure, match=r"^model\.engine=dgl: .*cuda:0.* model\.engine=torch$"):
        run_training(settings(small, "train.device=cuda", "model.engine=dgl", f"run.dir={tmp_path / 'dgl'}"))
    assert list(tmp_path.iterdir()) == [run]


@pytest.mark.parametrize(
    ("device", "parts", "why"),
    [
        ("cpu", 1, "needs CUDA, .*=cpu .*"),
        ("cuda", 3, "3 processes need .*=cuda has 2"),
        ("cuda:1", 2, "2 processes .*=cuda:1 has 1"),
    ],
)
def test_nccl_needs_a_device_for_each_process(tmp_path, monkeypatch, small, device, parts, why) -> None:
    set_device_count(monkeypatch, 2)
    keys = [f"train.device={device}", "train.backend=nccl", f"partition.parts={parts}", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(Failure, match=rf"^train\.backend=nccl: .*{why}; use train\.backend=auto$"):
        run_training(settings(small, *keys))
    assert list(tmp_path.iterdir()) == []


class Shift(torch.nn.Module):
    """A model that shifts nodes by parameters; its forward pass creates no tensor without a device."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.by = torch.nn.Parameter(torch.zeros(3, 3, dtype=dtype))

    def forward(self, graph: dgl.DGLGraph) -> tuple[torch.Tensor, torch.Tensor]:
        return graph.ndata["x"].to(self.by) + self.by[0], self.by.expand(graph.batch_size, -1, -1)


def two_graphs(*, part: bool) -> dgl.DGLGraph:
    """A batch of graphs of 30 and 400 nodes; with ``part``, with the fields of a store."""
    graphs = [make_graph(n, n) for n in (30, 400)]
    for graph in graphs if part else ():
        n = graph.num_nodes()
        graph.ndata["gid"], graph.ndata["total"] = torch.arange(n), torch.full((n,), n)
        graph.ndata["centroid"] = graph.ndata["x"].mean(0).expand(n, 3)
    return dgl.batch(graphs)


def mmd(z: torch.Tensor, graph: dgl.DGLGraph) -> torch.Tensor:
    total = graph.batch_num_nodes().unsqueeze(1)
    return losses.mmd(z, graph, total, config.Loss(), torch.Generator(device="cpu").manual_seed(0))


@pytest.mark.parametrize("part", [False, True])
def test_a_loss_creates_no_tensor_on_the_default_device(part: bool) -> None:
    graph, chosen = two_graphs(part=part), config.load(None)
    z, model = torch.randn(2, 3, 3, dtype=torch.float64), Shift(torch.float64)
    expected = mmd(z, graph)
    with torch.device("meta"):  # tensors created without a device have no values
        assert torch.equal(mmd(z, graph), expected)
        loss, mse = trainer.compute_loss(chosen, model, graph, SingleProcess(), torch.Generator(device="cpu"))
        loss.backward()
    assert loss.device == mse.device == model.by.grad.device == torch.device("cpu")
    assert loss.isfinite()


def test_an_epoch_creates_no_tensor_on_the_default_device(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(small, "train.clip=1", "train.accumulate=2", "train.lr=0")
    data, model = dataset.open_dataset(chosen, 0, 1), Shift()
    optimizer = torch.optim.Adam(model.parameters())  # creates its state in the first epoch

    def epoch() -> dict[str, float]:
        """The sums of an epoch, except times."""
        state = TrainingState()
        for _ in trainer.Trainer(SingleProcess(), chosen, model, optimizer, data, state).steps():
            pass
        return {name: value for name, value in state.sums.items() if not name.endswith("_s")}

    expected = epoch(), trainer.evaluate_split(model, data, "valid", chosen, SingleProcess())
    assert set(expected[0]) == {"loss", "mse", "batches", "grad_norm"}
    with torch.device("meta"):
        row = epoch()
        assert trainer.evaluate_split(model, data, "valid", chosen, SingleProcess()) == expected[1]
    assert row == expected[0]
    # negative control: a tensor that is created without a device
    monkeypatch.setattr(losses, "draw", lambda total, count, generator: torch.arange(count))
    with torch.device("meta"), pytest.raises((RuntimeError, NotImplementedError)):
        epoch()


@needs_cuda
@pytest.mark.parametrize("parts", [1, 2])
def test_training_on_cuda(small: Path, make_store: Callable[..., Path], tmp_path: Path, parts: int) -> None:
    """Two steps, two resumed ones and an evaluation agree with the CPU; checkpoints hold CPU tensors."""
    path = small if parts == 1 else make_store(2, "metis", frames=2)
    results = {}
    for device in ("cpu", "cuda"):
        run = tmp_path / device
        overrides = [f"train.device={device}", f"run.dir={run}", "model.hidden=16", "model.layers=2"]
        run_training(settings(path, *overrides, "train.epochs=1"))
        run_training(settings(path, *overrides, "train.epochs=2"), resume=True)
        table = pd.read_csv(run / "metrics.csv")
        results[device] = [*table["train_loss"], *table["valid_mse"], *run_evaluation(run).values()]
        saved = torch.load(run / "last.pt", weights_only=True)
        tensors = [*saved["model"].values(), *(t for s in saved["optimizer"]["state"].values() for t in s.values())]
        assert {t.device.type for t in tensors} == {"cpu"}
        assert (table["peak_gb"] > 0).all()
    assert results["cuda"] == pytest.approx(results["cpu"], rel=1e-3)


@needs_cuda
@pytest.mark.parametrize("name", network.MODELS)
def test_a_model_on_cuda_accepts_a_graph_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    graph, model = two_graphs(part=False), network.model_class(name)(features=3, node_attributes=2).double()
    with torch.no_grad():
        expected = model(graph)
        result = model.to("cuda")(two_graphs(part=False))
    for a, b in zip(result, expected, strict=True):
        assert a.is_cuda
        assert torch.allclose(a.cpu(), b, atol=1e-9)
