"""What a run records, the learning rate of every step, and the line that ends a run whose numbers are not finite."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import PLAIN_TRAIN, At, settings

from dist_egnn import config
from dist_egnn.commands.train import resume_training, run_training
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint, optim, trainer

ROOT = Path(__file__).parents[2]


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    return found


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_recorded(small: Path, make_store: Callable[..., Path], tmp_path: Path, parts: int) -> None:
    path, run = small if parts == 1 else make_store(2), tmp_path / "run"
    run_training(settings(path, run, "train.epochs=2"))
    resume_training(run, ["train.epochs=12"])
    rows = pd.read_csv(run / "metrics.csv")
    page = (ROOT / "docs" / "outputs.md").read_text()
    (table,) = re.findall(r"^### metrics\.csv\n\n(.*?)\n\n", page, re.M | re.S)
    told = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert list(rows) == told
    assert rows["epoch"].tolist() == list(range(12))
    phases = rows[["data_s", "forward_s", "communication_s", "backward_s"]]
    assert (phases.to_numpy() >= 0).all()
    assert (phases.sum(axis=1) <= rows["step_s"]).all()
    assert (3 * rows["step_s"] <= rows["epoch_s"]).all()
    assert ((rows["communication_s"] > 0) == (parts > 1)).all()
    assert (rows["grad_norm"] > 0).all()

    written = events(run)
    ranks = [f"memory_gb/rank{rank}" for rank in range(parts)]
    assert set(written.Tags()["scalars"]) == {*told[1:], *ranks}
    for tag in (*told[1:], *ranks):
        assert [e.step for e in written.Scalars(tag)] == list(range(12)), tag
    peaks = [max(written.Scalars(rank)[epoch].value for rank in ranks) for epoch in range(12)]
    assert rows["peak_gb"].tolist() == pytest.approx(peaks, rel=1e-6)
    assert set(written.Tags()["histograms"]) == {f"virtual_nodes/{axis}" for axis in "xyz"}
    histogram = written.Histograms("virtual_nodes/x")
    assert [h.step for h in histogram] == [0, 10]
    assert histogram[0].histogram_value.num == 3 * 3  # 3 samples to validate on, 3 virtual nodes


def test_grad_norm_is_that_before_clipping(small, tmp_path):
    found = []
    for clip in (0, 1e-3):
        run = tmp_path / str(clip)
        run_training(settings(small, run, "train.epochs=1", "train.lr=0", f"train.clip={clip}"))
        found.append(pd.read_csv(run / "metrics.csv")["grad_norm"][0])
    assert found[0] == found[1] > 1e-3


# learning rates


def rates(*given: str, steps: int = 4) -> list[float]:
    """Of every step, the validation MSE never getting better."""
    chosen, scale, found = config.load(None, ["train.lr=2", *given]).train, 1.0, []
    for epoch in range(chosen.epochs):
        found += [optim.learning_rate(chosen, epoch, (step + 1) / steps, scale) for step in range(steps)]
        scale = optim.plateau_scale(chosen, epoch, scale)  # the first epoch is the best: 0, 1, 2, … waited
    return found


def test_constant_and_warmup():
    assert rates("train.epochs=2") == [2.0] * 8
    assert rates("train.epochs=2", "train.warmup=1") == [0.5, 1.0, 1.5, 2.0] + [2.0] * 4
    assert rates("train.epochs=2", "train.warmup=0.5") == [1.0, 2.0] + [2.0] * 6


def test_cosine_is_torchs():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()
    assert rates("train.epochs=10", "train.schedule=cosine", steps=1) == pytest.approx(expected)
    warm = rates("train.epochs=12", "train.schedule=cosine", "train.warmup=2", steps=1)
    assert warm == pytest.approx([1.0, 2.0, *expected])


@pytest.mark.parametrize("patience", [1, 3])
def test_plateau_is_torchs(patience):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.1, patience=patience - 1, threshold=0, eps=0
    )
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step(1.0)
    given = (
        "train.epochs=12",
        "train.schedule=plateau",
        "train.plateau_factor=0.1",
        f"train.plateau_epochs={patience}",
    )
    assert rates(*given, steps=1) == pytest.approx(expected)


def test_a_run_uses_its_schedule(small, tmp_path):
    """A rate of nothing never gets better, so it falls after every epoch but the first."""
    plateau = ("train.schedule=plateau", "train.plateau_epochs=1", "train.weight_decay=0", "train.warmup=0")
    run_training(settings(small, tmp_path / "run", "train.epochs=4", "train.lr=1e-30", *plateau))
    rows = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert rows["lr"].tolist() == pytest.approx([1e-30, 1e-30, 5e-31, 2.5e-31], rel=1e-12, abs=0)


# numbers that are not finite


def _spoil(value: float, name: str) -> None:
    """Set a weight of the model in training; found by its name, wherever it is."""
    import gc

    for model in gc.get_objects():
        if isinstance(model, torch.nn.Module) and name in dict(model.named_parameters()):
            with torch.no_grad():
                dict(model.named_parameters())[name].view(-1)[0] = value


NAME = "layers.0.phi_e.0.weight"


@pytest.mark.parametrize("parts", [1, 2])
def test_a_parameter_that_is_not_finite(small, make_store, tmp_path, monkeypatch, parts):
    """Told before anything is written over the last good checkpoint."""
    path = small if parts == 1 else make_store(2)
    monkeypatch.setattr(trainer, "train", At(4, None, _spoil, float("nan"), NAME))
    says = rf"epoch 1, step 1: parameter {NAME.replace('.', '[.]')} is NaN; .*lower train\.lr"
    with pytest.raises(Failure, match=says):
        run_training(settings(path, tmp_path / "run", "train.epochs=4"))
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in state["model"].values())
    monkeypatch.setattr(trainer, "train", PLAIN_TRAIN)
    resume_training(tmp_path / "run", ["train.lr=1e-3", "train.clip=0.1"])  # what the line proposes
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["epoch"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_sample_is_named(small, make_store, tmp_path, parts):
    """Much too large a step in the first epoch: the next forward pass fails, of a sample with a name."""
    path = small if parts == 1 else make_store(2)
    with pytest.raises(Failure) as caught:
        run_training(settings(path, tmp_path / "run", "train.lr=1e25", "train.warmup=0"))
    found = re.search(
        r"/run: epoch 0, step 1: the (.+) of sample (\d+) \(trajectory (\d+), frame (\d+)\) (is|are) (NaN|infinite); ",
        str(caught.value),
    )
    assert found, caught.value
    assert found[1] in ("predicted positions", "virtual nodes' positions", "squared error")
    assert int(found[3]) == int(found[2]) // 3  # three frames of each trajectory
    assert "\n" not in str(caught.value)
    assert f"distegnn train --resume {tmp_path}/run train.lr=2.5e+24 train.clip=0.5" in str(caught.value)


def test_a_validation_that_is_not_finite(small, tmp_path, monkeypatch):
    """The last step of the first epoch spoils what only validation sees."""
    monkeypatch.setattr(trainer, "evaluate_split", lambda *_: float("inf"))
    with pytest.raises(Failure, match=r"epoch 0, validation: the loss is not finite \(samples 6, 7, 8\)"):
        run_training(settings(small, tmp_path / "run"))
    assert not (tmp_path / "run" / "best.pt").exists()
