"""What a run records, the learning rate of every step, and the error of a run that diverges."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import PLAIN_TRAIN, ActAfterStep, resume_training, settings
from torch.optim import lr_scheduler

from dist_egnn import config
from dist_egnn.commands.train import run_training
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint, trainer
from dist_egnn.train.events import GROUPS, LEFT, SIDE, TOP, density
from dist_egnn.train.state import TrainingState

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("parts", [1, 2])
def test_metrics_and_events(small: Path, make_store: Callable[..., Path], tmp_path: Path, parts: int) -> None:
    path, run = small if parts == 1 else make_store(2), tmp_path / "run"
    run_training(settings(path, run, "train.epochs=2"))
    time.sleep(1)  # TensorBoard sorts event files by the second of their creation
    resume_training(run, ["train.epochs=12"])
    rows = pd.read_csv(run / "metrics.csv")
    (table,) = re.findall(r"^### metrics\.csv\n\n(.*?)\n\n", (ROOT / "docs" / "outputs.md").read_text(), re.M | re.S)
    documented = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert list(rows) == documented
    assert rows["epoch"].tolist() == list(range(1, 13))
    phases = rows[["data_s", "forward_s", "communication_s", "backward_s"]]
    assert (phases.to_numpy() >= 0).all()
    assert (phases.sum(axis=1) <= rows["step_s"]).all()
    assert (3 * rows["step_s"] <= rows["epoch_s"]).all()
    assert ((rows["communication_s"] > 0) == (parts > 1)).all()
    assert (rows["grad_norm"] > 0).all()

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    events.Reload()
    ranks = [f"memory/rank{rank}_gb" for rank in range(parts)]
    by_step = {f"{tag}_step" for tag in ("loss/train", "loss/train_mse", "model/grad_norm", "model/lr")}
    final = {f"hparam/{name}": name for name in ("train_mse", "valid_mse", "best_valid_mse")}
    tags = {GROUPS.get(name, f"time/{name}"): name for name in documented}
    assert set(events.Tags()["scalars"]) == {*tags, *ranks, *by_step, *final}
    for tag, name in tags.items():
        scalars = events.Scalars(tag)
        assert [e.step for e in scalars] == list(range(3, 37, 3)), tag  # an epoch has 3 steps
        assert [e.value for e in scalars] == pytest.approx(rows[name].tolist(), rel=1e-6), tag
    for tag in by_step:
        scalars, name = events.Scalars(tag), tags[tag.removesuffix("_step")]
        assert [e.step for e in scalars] == list(range(1, 37)), tag
        means = np.reshape([e.value for e in scalars], (12, 3)).mean(1)
        if name != "lr":  # the row has that of the last step
            np.testing.assert_allclose(means, rows[name], rtol=1e-5, err_msg=tag)
    peaks = [max(events.Scalars(rank)[epoch].value for rank in ranks) for epoch in range(12)]
    assert rows["peak_gb"].tolist() == pytest.approx(peaks, rel=1e-6)
    expected = {**rows[["train_mse", "valid_mse"]].iloc[-1], "best_valid_mse": rows["valid_mse"].min()}
    assert {name: events.Scalars(tag)[-1].value for tag, name in final.items()} == pytest.approx(expected)
    assert set(events.Tags()["images"]) == {"validation/displacement", "validation/error"}
    assert [image.step for image in events.Images("validation/error")] == list(range(3, 37, 3))
    assert set(events.Tags()["histograms"]) == {f"model/virtual_nodes_{axis}" for axis in "xyz"}
    histogram = events.Histograms("model/virtual_nodes_x")
    assert [h.step for h in histogram] == [3, 33]
    assert histogram[0].histogram_value.num == 3 * 3  # 3 samples in validation, 3 virtual nodes


def test_grad_norm_is_that_before_clipping(small, tmp_path):
    norms = []
    for clip in (0, 1e-3):
        run = tmp_path / str(clip)
        run_training(settings(small, run, "train.epochs=1", "train.lr=0", f"train.clip={clip}"))
        norms.append(pd.read_csv(run / "metrics.csv")["grad_norm"][0])
    assert norms[0] == norms[1] > 1e-3


def test_validation_every_third_epoch(small, tmp_path):
    """Metrics of the other epochs have no validation MSE, and patience counts epochs up to the last validation."""
    tables = {}
    for every in (1, 3):
        run = tmp_path / str(every)
        run_training(settings(small, run, "train.epochs=5", f"train.valid_interval={every}"))
        tables[every] = pd.read_csv(run / "metrics.csv")
    assert tables[3]["valid_mse"].notna().tolist() == [False, False, True, False, True]
    for column in ("train_mse", "valid_mse"):
        known = tables[3][column].notna()
        assert (tables[3][column][known] == tables[1][column][known]).all()
    assert len(rates("train.epochs=50", "train.valid_interval=3", "train.patience=4")) == 9  # 3 improves, 6 waits 3


def rates(*given: str, steps: int = 1) -> list[float]:
    """Learning rates of all steps of a run whose validation MSE never improves."""
    chosen, state, result = config.load(None, ["train.lr=2", *given]).train, TrainingState(), []
    while not state.finished(chosen):
        for step in range(steps):
            state.step = step
            result.append(state.learning_rate(chosen, steps))
        state.end_epoch(1.0, chosen)
    return result


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_schedules_are_those_of_torch(patience):
    """Plateau, or cosine if patience is 0; and warm-up by hand."""
    assert rates("train.epochs=2", steps=4) == [2.0] * 8
    assert rates("train.epochs=2", "train.warmup=1", steps=4) == [0.5, 1.0, 1.5, 2.0] + [2.0] * 4
    assert rates("train.epochs=2", "train.warmup=0.5", steps=4) == [1.0, 2.0] + [2.0] * 6
    optimizer, result = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=2.0), []
    given, scheduler = ["train.schedule=cosine"], lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    if patience:
        given = ["train.schedule=plateau", "train.plateau_factor=0.1", f"train.plateau_epochs={patience}"]
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=patience - 1, threshold=0, eps=0)
    for _ in range(12):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*[1.0] * bool(patience))
    assert rates("train.epochs=12", *given) == pytest.approx(result)
    if not patience:
        assert rates("train.epochs=14", "train.warmup=2", *given) == pytest.approx([1.0, 2.0, *result])


def test_a_run_uses_its_schedule(small, tmp_path):
    """With a rate of nearly zero validation never improves, so the rate falls after every epoch but the first."""
    plateau = ("train.schedule=plateau", "train.plateau_epochs=1", "train.weight_decay=0", "train.warmup=0")
    run_training(settings(small, tmp_path / "run", "train.epochs=4", "train.lr=1e-30", *plateau))
    rows = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert rows["lr"].tolist() == pytest.approx([1e-30, 1e-30, 5e-31, 2.5e-31], rel=1e-12, abs=0)


NAME = "layers.0.phi_e.0.weight"


def _set_nan() -> None:
    """Set a weight of the model in training, which the garbage collector finds, to NaN."""
    for training in gc.get_objects():
        if issubclass(type(training), trainer.Trainer):  # isinstance would ask what weak proxies stand for
            with torch.no_grad():
                training.model.get_parameter(NAME).view(-1)[0] = float("nan")


@pytest.mark.parametrize("parts", [1, 2])
def test_a_nan_parameter_ends_the_run_and_the_last_checkpoint_stays(small, make_store, tmp_path, monkeypatch, parts):
    path = small if parts == 1 else make_store(2)
    monkeypatch.setattr(trainer, "train", ActAfterStep(4, None, _set_nan))
    with pytest.raises(Failure, match=rf"epoch 2, step 1: parameter {re.escape(NAME)} is NaN; .*train\.lr"):
        run_training(settings(path, tmp_path / "run", "train.epochs=4"))
    last = checkpoint.load(tmp_path / "run" / "last.pt")
    assert (last["epoch"], last["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in last["model"].values())
    monkeypatch.setattr(trainer, "train", PLAIN_TRAIN)
    resume_training(tmp_path / "run", ["train.lr=1e-3", "train.clip=0.1"])  # the remedy in the message
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["epoch"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("parts", [1, 2])
def test_divergence_names_the_sample(small, make_store, tmp_path, parts):
    """After a step that is much too large, the next forward pass is not finite."""
    path = small if parts == 1 else make_store(2)
    with pytest.raises(Failure) as caught:
        run_training(settings(path, tmp_path / "run", "train.lr=1e25", "train.warmup=0"))
    message = str(caught.value)
    quantity = "predicted positions|virtual nodes' positions|squared error"
    match = re.search(rf"/run: epoch 1, step 2: \w+ ({quantity}) of sample (\d+) \(trajectory (\d+), frame", message)
    assert match, message
    assert int(match[3]) == int(match[2]) // 3  # three frames of each trajectory
    assert "\n" not in message
    assert f"distegnn train --resume {tmp_path}/run train.lr=2.5e+24 train.clip=0.5" in message


def test_a_validation_that_is_not_finite(small, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "evaluate_split", lambda *_: float("inf"))
    with pytest.raises(Failure, match=r"epoch 1, validation: the loss is not finite \(samples 6, 7, 8\)"):
        run_training(settings(small, tmp_path / "run"))
    assert not (tmp_path / "run" / "best.pt").exists()


def test_both_axes_of_a_picture_are_equal() -> None:
    picture = density(np.array([1.0, 0.5]), np.array([0.5, 0.25]), "")
    inside = picture[TOP + 2 : TOP + SIDE - 1, LEFT + 2 : LEFT + SIDE - 1]
    rows, columns = (inside.max(2) < 60).nonzero()  # dark cells
    places = [columns.max(), rows.min(), columns.min(), rows.max()]
    assert [place / SIDE for place in places] == pytest.approx([1, 0.5, 0.5, 0.75], abs=0.02)
