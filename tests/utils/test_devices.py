"""`train.device`: names, what is refused, and that nothing of a step stays behind on the CPU (or goes where torch likes)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dgl
import pandas as pd
import pytest
import torch
from small import DATA
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

NO_CUDA = "no CUDA device: torch sees none"


def settings(path: Path, *overrides: str) -> config.Config:
    data = [f"data.{key}={value}" for key, value in DATA.items() if key != "frames"]
    return config.load(None, [f"data.path={path}", *data, "data.frames=2", "train.batch_size=2", *overrides])


def see(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let torch see so many CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "name", "rank", "means"),
    [
        (0, "cpu", 1, "cpu"),
        (2, "cpu", 1, "cpu"),
        (0, "auto", 1, "cpu"),
        (2, "auto", 0, "cuda:0"),
        (2, "auto", 3, "cuda:1"),
        (2, "cuda", 3, "cuda:1"),
        (2, "cuda:1", 2, "cuda:1"),
    ],
)
def test_what_a_name_means_to_a_process(monkeypatch, count, name, rank, means):
    see(monkeypatch, count)
    assert devices.resolve(config.load(None, [f"train.device={name}"]).train.device, rank) == torch.device(means)


@pytest.mark.parametrize(
    ("count", "name", "says"),
    [
        (0, "cuda", r"train\.device=cuda: not available: torch [\d.]+\S* sees 0 CUDA devices; use train\.device=cpu"),
        (
            1,
            "cuda:1",
            r"train\.device=cuda:1: not available: torch [\d.]+\S* sees 1 CUDA device; use train\.device=cpu",
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(tmp_path, monkeypatch, small, count, name, says):
    see(monkeypatch, count)
    run = tmp_path / "run"
    chosen = settings(small, f"train.device={name}", "partition.parts=2", f"run.dir={run}")
    with pytest.raises(Failure, match=f"^{says}$"):
        run_training(chosen)
    assert list(tmp_path.iterdir()) == []
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml(chosen))
    with pytest.raises(Failure, match=rf"config\.yaml: {says}$"):
        run_evaluation(run)
    assert [f.name for f in run.iterdir()] == ["config.yaml"]


def test_dgl_without_a_build_is_refused_before_any_work(tmp_path, monkeypatch, small):
    see(monkeypatch, 1)
    monkeypatch.setattr(message_passing, "dgl_supports", lambda device: False)
    chosen = settings(small, "train.device=cuda", "model.engine=dgl", f"run.dir={tmp_path / 'run'}")
    with pytest.raises(
        Failure, match=r"^model\.engine=dgl: this DGL has no build for cuda:0; use model\.engine=torch$"
    ):
        run_training(chosen)
    assert list(tmp_path.iterdir()) == []


class Shift(torch.nn.Module):
    """Moves nodes and virtual nodes by learnable numbers: what train.py asks of a model, and makes no tensor itself."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.by = torch.nn.Parameter(torch.zeros(3, 3, dtype=dtype))

    def forward(self, graph: dgl.DGLGraph) -> tuple[torch.Tensor, torch.Tensor]:
        return graph.ndata["x"].to(self.by) + self.by[0], self.by.expand(graph.batch_size, -1, -1)


def two_graphs(*, part: bool) -> dgl.DGLGraph:
    """A batch of graphs of 30 and 400 nodes, as stores hold them where ``part``."""
    graphs = [make_graph(n, n) for n in (30, 400)]
    for graph in graphs if part else ():
        n = graph.num_nodes()
        graph.ndata["gid"], graph.ndata["total"] = torch.arange(n), torch.full((n,), n)
        graph.ndata["centroid"] = graph.ndata["x"].mean(0).expand(n, 3)
    return dgl.batch(graphs)


def mmd(z: torch.Tensor, graph: dgl.DGLGraph) -> torch.Tensor:
    total = graph.batch_num_nodes().unsqueeze(1)
    drawn = torch.Generator(device="cpu").manual_seed(0)
    return losses.mmd(z, graph, total, config.Loss(), drawn)


@pytest.mark.parametrize("part", [False, True])
def test_a_loss_makes_no_tensor_on_a_default_device(part: bool) -> None:
    graph, chosen = two_graphs(part=part), config.load(None)
    z, model = torch.randn(2, 3, 3, dtype=torch.float64), Shift(torch.float64)
    expected = mmd(z, graph)
    with torch.device("meta"):  # where whatever is made without a device ends up, and has no numbers
        assert torch.equal(mmd(z, graph), expected)
        loss, mse = trainer.compute_loss(chosen, model, graph, SingleProcess(), torch.Generator(device="cpu"))
        loss.backward()
    assert loss.device == mse.device == model.by.grad.device == torch.device("cpu")
    assert loss.isfinite()


def test_an_epoch_makes_no_tensor_on_a_default_device(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(small, "train.clip=1", "train.accumulate=2", "train.lr=0")
    read, model = dataset.open_dataset(chosen, 0, 1), Shift()
    optimizer = torch.optim.Adam(model.parameters())  # makes its state in the first epoch

    def epoch() -> dict[str, float]:
        """The sums of an epoch, but for seconds."""
        state = TrainingState()
        for _ in trainer.Trainer(SingleProcess(), chosen, model, optimizer, read, state).steps():
            pass
        return {name: value for name, value in state.sums.items() if not name.endswith("_s")}

    expected = epoch(), trainer.evaluate_split(model, read, "valid", chosen, SingleProcess())
    assert set(expected[0]) == {"loss", "mse", "batches", "grad_norm"}
    with torch.device("meta"):
        row = epoch()
        assert trainer.evaluate_split(model, read, "valid", chosen, SingleProcess()) == expected[1]
    assert row == expected[0]
    # and the check sees a tensor that is made without a device
    monkeypatch.setattr(losses, "draw", lambda total, count, generator: torch.arange(count))
    with torch.device("meta"), pytest.raises((RuntimeError, NotImplementedError)):
        epoch()


@pytest.mark.parametrize("part", [False, True])
def test_a_loss_takes_the_graph_to_the_model(part: bool) -> None:
    """meta as a second device: torch refuses to mix the two, though there are no numbers there."""
    graph = two_graphs(part=part)
    z = torch.randn(2, 3, 3, dtype=torch.float64).to("meta").requires_grad_()
    mmd(z, graph).backward()
    assert z.grad is not None
    assert z.grad.is_meta
    model = Shift(torch.float64).to("meta")
    if part:  # else the nodes would have to be counted, which takes numbers
        loss, mse = trainer.compute_loss(
            config.load(None, ["loss.mmd=0"]), model, graph, SingleProcess(), torch.Generator()
        )
        loss.backward()
        assert loss.is_meta
        assert mse.is_meta
    with pytest.raises(RuntimeError, match="device"):
        losses.squared_error(model(graph)[0], graph.ndata["y"], torch.ones(2, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
@pytest.mark.parametrize("parts", [1, 2])
def test_training_on_cuda(small: Path, make_store: Callable[..., Path], tmp_path: Path, parts: int) -> None:
    """Two steps, a resumed third and fourth, and an evaluation: near what the CPU computes, checkpoints without CUDA."""
    path = small if parts == 1 else make_store(2, "metis", frames=2)
    found = {}
    for device in ("cpu", "cuda"):
        run = tmp_path / device
        shown = [f"train.device={device}", f"run.dir={run}", "model.hidden=16", "model.layers=2"]
        run_training(settings(path, *shown, "train.epochs=1"))
        run_training(settings(path, *shown, "train.epochs=2"), resume=True)
        table = pd.read_csv(run / "metrics.csv")
        found[device] = [*table["train_loss"], *table["valid_mse"], *run_evaluation(run).values()]
        saved = torch.load(run / "last.pt", weights_only=True)
        tensors = [*saved["model"].values(), *(t for s in saved["optimizer"]["state"].values() for t in s.values())]
        assert {t.device.type for t in tensors} == {"cpu"}
        assert (table["peak_gb"] > 0).all()
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
@pytest.mark.parametrize("name", network.MODELS)
def test_a_model_on_cuda_takes_a_graph_from_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    graph, model = two_graphs(part=False), network.model_class(name)(features=3, node_attributes=2).double()
    with torch.no_grad():
        expected = model(graph)
        found = model.to("cuda")(two_graphs(part=False))
    for a, b in zip(found, expected, strict=True):
        assert a.is_cuda
        assert torch.allclose(a.cpu(), b, atol=1e-9)
