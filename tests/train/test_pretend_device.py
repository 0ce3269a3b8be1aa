"""Training, evaluation and rollouts on a pretend device (tests/pretend_device.py) equal those on the CPU, for every model."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dist_egnn.partition import store_writer
from small_data import falling_swirl

import dist_egnn
from dist_egnn import Trajectories, Writer, config
from dist_egnn.data import dataset
from dist_egnn.distributed import comm as comms
from dist_egnn.distributed import spawn
from dist_egnn.distributed.comm import Comm, ProcessGroup, SingleProcess
from dist_egnn.errors import Failure
from dist_egnn.evaluate import parallel_predictor
from dist_egnn.evaluate.boundary_conditions import RolloutJob
from dist_egnn.evaluate.predictor import Predictor
from dist_egnn.evaluate.simulation import Simulation
from dist_egnn.models import network
from dist_egnn.ops.message_passing import Nodes
from dist_egnn.train import losses, trainer
from dist_egnn.utils import devices

DATA = ["data.frames=2", "data.radius=0.35", "data.features=[mass]", "data.node_attributes=[mass]"]
DATA += ["data.velocity_scale=1"]
KINDS = {"": [*DATA, "data.horizon=3", "loss.samples=4"]}
KINDS["periodic"] = [*DATA, "data.horizon=1", "data.history=2", "data.periodic=true", "loss.mmd=0"]
KINDS["simulator"] = [*DATA, "data.horizon=1", "data.history=2", "data.pushforward=1", "data.walls=box", "loss.mmd=0"]
KINDS["simulator"] += ["train.noise=0.01", "model.predicts=acceleration", "data.fixed=body"]
OPTIONS = {"EGNN": ["model.precision=bf16-messages"]}  # of cases that are one block
OPTIONS["FastEGNN"] = ["model.attention=true", "model.normalize=true", "model.gravity=[0,-1,0]"]
MODES = ["bridge", "exchange"]
CASES = [("", name, mode) for name in network.MODELS for mode in MODES]
CASES += [("simulator", name, mode) for name in ("FastEGNN", "RF") for mode in MODES]
CASES += [("periodic", "FastEGNN", mode) for mode in MODES]
SUM = ProcessGroup.sum

# tensors on the wrong device, to show that the cases above would fail
WRONG = {"target": lambda: mock.patch.object(losses, "squared_error", lambda p, y, n: (p - y.cpu()).square().mean())}
WRONG["sum"] = lambda: mock.patch.object(ProcessGroup, "sum", lambda comm, t: SUM(comm, t).cpu())
WRONG["index"] = lambda: mock.patch.object(Nodes, "spread", lambda nodes, name: nodes.shared[name].cpu())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trajectories for each kind of model."""
    result = {kind: tmp_path_factory.mktemp("pretend") / "data.h5" for kind in KINDS}
    about: dict[str, Any] = {"dt": 1.0, "source": "", "box": np.array([[-0.2, -0.2, -0.2], [1.2, 1.3, 1.2]])}
    for kind, path in result.items():
        with Writer(path, {}) as out:
            for seed, split in enumerate(("train", "valid")):
                position, _, attributes = falling_swirl(90, seed)
                about |= {"attributes": attributes | {"body": np.arange(90) < 10}, "gravity": [0, -0.002, 0]}
                out.add(position, split=split, periodic=kind == "periodic", **about)
    return result


@pytest.fixture(scope="module")
def stores(files: dict[str, Path]) -> dict[str, Path]:
    """A store of two parts for each kind of model."""
    result = {}
    for kind, keys in KINDS.items():
        file, result[kind] = Trajectories(files[kind]), files[kind].with_name("store")
        inputs = store_writer.build_inputs(file, parts=2, method="bisection", settings=config.load(None, keys).data)
        store_writer.write_store(file, result[kind], inputs, lambda *_: None)
    return result


def work(comm: Comm, made: config.Config, file: Path) -> dict[str, float]:
    """Numbers of a training step of two batches, an evaluation and a rollout on this rank."""
    device, samples = trainer.join_device(comm, made), dataset.open_dataset(made, comm.rank, comm.size)
    model = trainer.build_model(made, samples.widths, comm, samples.statistics()).to(device)
    training = trainer.Trainer(comm, made, model, torch.optim.Adam(model.parameters(), lr=1e-3), samples)
    steps = training.steps()
    next(steps)
    steps.close()
    assert {parameter.device for parameter in model.parameters()} == {device}
    result = {name: training.last_step[name] for name in ("train_loss", "train_mse", "grad_norm")}
    result["valid_mse"] = trainer.evaluate_split(model, samples, "valid", made, comm)
    spec = dataset.sample_spec(made.data, made.data.features or ())
    job = RolloutJob(made, "", str(file), spec, 1, 3, steps=2, repartition=1, bounds="none", out="")
    *_, last = Simulation(comm, job, model.eval(), watch=False)
    return result | {"moved": float(np.abs(last.x).sum()), "virtual": float(np.abs(last.z).sum())}


def whole_run(made: config.Config, run: Path) -> list[float]:
    """Errors of a training of one epoch and its resume, of an evaluation, and a prediction of the loaded run."""
    made.run.dir = str(run)
    trainer.train(SingleProcess(), made)
    made.train.epochs = 2
    rows = trainer.train(SingleProcess(), made, resume=True)
    errors = trainer.evaluate(SingleProcess(), made, run / "best.pt", "valid")
    x, v = np.random.default_rng(0).normal(size=(2, 20, 3))
    y = dist_egnn.load(run, device=made.train.device)(x, v, {"mass": np.ones(20)})
    assert isinstance(y, np.ndarray)
    saved = torch.load(run / "last.pt", weights_only=True)["model"]
    assert all(type(value) is torch.Tensor and value.device.type == "cpu" for value in saved.values())
    return [rows["train_loss"], rows["valid_mse"], errors["FastEGNN"], float(np.abs(y - x).sum())]


def work_on_both_devices(comm: Comm, stores: dict[str, Path], files: dict[str, Path]) -> dict[Any, Any]:
    """Of each case the numbers on the CPU and on the pretend device, or an error; of each wrong placement its error."""
    import pretend_device  # in this process only: it changes torch

    plain, result = devices.resolve, dict[Any, Any]()
    devices.resolve = lambda name, rank=0: pretend_device.DEVICE if name == "cuda" else plain(name)

    def run(*case: str) -> Any:
        store, file = stores[case[0]], files[case[0]]
        try:
            return [work(comm, settings(store, *case, f"train.device={of}"), file) for of in ("cpu", "cuda")]
        except Exception:
            return traceback.format_exc()

    for case in CASES:
        result[case] = run(*case)
    devices.check_available = lambda *_: None
    if comm.rank == 0:
        for of in ("cpu", "cuda"):
            keys = f"train.device={of}", "partition.parts=1", "train.epochs=1", "train.ema=0.9"
            result[of] = whole_run(settings(files[""], "", "FastEGNN", "bridge", *keys), files[""].with_name(of))
    comm.max(0)  # the runs are written
    draw = np.random.default_rng(1)
    fields = {"x": draw.random((60, 3)), "v": draw.random((60, 3)), "f": np.ones((60, 1)), "a": np.ones((60, 1))}
    for of in ("cpu", "cuda"):
        predictor = Predictor(files[""].with_name("cpu"), of, comm)
        single = {name: value.astype(np.float32) for name, value in fields.items()}
        result["parallel", of] = float(parallel_predictor._predict(comm, predictor, single, None, None)[1].abs().sum())
    for name, fault in WRONG.items():
        with fault():
            result[name] = run("", "FastEGNN", "bridge")
    return result | without_the_host(comm, run)


def without_the_host(comm: Comm, run: Callable[..., Any]) -> dict[Any, Any]:
    """NCCL's path: results of both modes, and copies to the host and back in sums and an exchange, by gloo and by NCCL.

    gloo takes the place of NCCL, and sends what is on the pretend device.
    """
    import pretend_device

    plain, device, result = dist.all_to_all_single, pretend_device.DEVICE, dict[Any, Any]()

    def all_to_all_single(*tensors: torch.Tensor, group: Any = None, **options: Any) -> Any:
        received, sent, *counts = tensors
        assert (group is not None) == (received.device == device)
        return plain(*(getattr(t, "host", t) for t in (received, sent)), *counts, group=group, **options)

    def copies() -> int:
        pretend_device.transfers.clear()
        total = comm.sum(torch.full((5,), comm.rank + 1.0, device=device))
        rows = comm.all_to_all(torch.full((2, 3), comm.rank, device=device), [1, 1], [1, 1])()
        assert (total.device, rows.device, len(rows)) == (device, device, 2)
        made = len(pretend_device.transfers)
        assert (total.tolist(), rows.tolist()) == ([3] * 5, [[0] * 3, [1] * 3])
        return made

    devices.number = lambda of: 0.0 if of.type == "cpu" else 7.0
    with pytest.raises(Failure, match=r"^train\.backend=nccl: processes 0, 1 share .*train\.backend=auto$"):
        comm.use_device(device, "nccl")
    devices.number = lambda of: 0.0 if of.type == "cpu" else comm.rank + 1.0
    comm.use_device(device, "gloo")
    result["copies"] = [copies()]
    with (
        mock.patch.multiple(dist, all_to_all_single=all_to_all_single),
        mock.patch.object(comms, "DEVICE_BACKEND", "gloo"),
    ):
        comm.use_device(device, "nccl")
        result["copies"].append(copies())
        result |= {("", mode): run("", "FastEGNN", mode) for mode in MODES}
    return result


def settings(store: Path, kind: str, name: str, mode: str, *more: str) -> config.Config:
    plain = mode == "bridge" and not kind
    more = (*(OPTIONS.get(name, []) if plain else ["model.tile=10"] if name != "Linear" else []), *more)
    keys = [*KINDS[kind], f"data.path={store}", f"partition.halo={mode}", "partition.parts=2"]
    keys += ["partition.method=bisection", f"model.name={name}", "model.hidden=8", "model.layers=2"]
    return config.load(None, [*keys, "model.engine=torch", "train.accumulate=2", "train.clip=1", *more])


@pytest.fixture(scope="module")
def results(stores: dict[str, Path], files: dict[str, Path]) -> list[dict[Any, Any]]:
    """Of each of two processes."""
    return spawn.run_ranks(work_on_both_devices, 2, stores, files)


@pytest.mark.parametrize("case", CASES)
def test_a_step_an_evaluation_and_a_rollout_equal_the_cpu(results, case) -> None:
    for rank in results:
        assert isinstance(rank[case], list), rank[case]
        on_cpu, on_device = rank[case]
        assert on_device == pytest.approx(on_cpu, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_sums_and_halo_rows_do_not_pass_the_host(results, mode) -> None:
    for rank in results:
        assert isinstance(rank["", mode], list), rank["", mode]
        assert rank["", mode][1] == pytest.approx(rank["", mode][0], rel=1e-4, abs=1e-9)
        assert rank["copies"] == [4, 0]  # by gloo, by NCCL


def test_a_run_its_resume_its_evaluation_and_its_predictor_equal_the_cpu(results) -> None:
    assert results[0]["cuda"] == pytest.approx(results[0]["cpu"], rel=1e-4)
    for rank in results:
        assert rank["parallel", "cuda"] == pytest.approx(rank["parallel", "cpu"], rel=1e-5)


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_on_the_wrong_device_is_an_error(results, name) -> None:
    for rank in results:
        assert "expected all tensors on one device" in str(rank[name])
