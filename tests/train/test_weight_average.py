"""train.ema: the averaged weights are those of the formula, are validated and saved, and survive a stop."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_runs import PLAIN_STEPS, ActAfterStep, assert_same, resume_training, settings

from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.distributed.comm import SingleProcess
from dist_egnn.train import checkpoint, trainer

EMA = ["train.ema=0.3", "train.epochs=3"]


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def _kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ema") / "run"
    run_training(settings(small, folder, *EMA))
    return folder


def test_the_average_of_the_formula_is_saved_and_validated(small, run, tmp_path, monkeypatch):
    history: list[dict[str, torch.Tensor]] = []

    def steps(training):
        if not history:
            history.append({name: p.detach().clone() for name, p in training.model.named_parameters()})
        for stop in PLAIN_STEPS(training):
            history.append({name: p.detach().clone() for name, p in training.model.named_parameters()})
            yield stop

    monkeypatch.setattr(trainer.Trainer, "steps", steps)
    run_training(settings(small, tmp_path / "again", *EMA))
    assert_same(tmp_path / "again", run)
    last = checkpoint.load(run / "last.pt")
    assert len(history) == 10
    for name, average in history[0].items():
        for k, weights in enumerate(history[1:], 1):
            decay = min(0.3, (1 + k) / (10 + k))
            average = decay * average + (1 - decay) * weights[name]
        torch.testing.assert_close(last["model"][name], average)
        assert torch.equal(last["unaveraged"][name], history[-1][name])
    assert not torch.equal(last["model"]["s"], last["unaveraged"]["s"])
    table = pd.read_csv(run / "metrics.csv")
    assert run_evaluation(run, "valid")["FastEGNN"] == pytest.approx(table["valid_mse"].min(), rel=1e-6)


def test_a_killed_run_resumes_with_the_same_bits(small, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train", ActAfterStep(5, None, _kill))
        with pytest.raises(Killed):
            run_training(settings(small, tmp_path / "run", *EMA))
    resume_training(tmp_path / "run", [])
    assert_same(tmp_path / "run", run)


def test_without_an_average_nothing_is_added(small):
    model = trainer.build_model(settings(small, Path("run")), (3, 1), SingleProcess())
    average = trainer.WeightAverage(model, 0.0)
    with average.applied():
        assert average.unaveraged() == {}
