"""train.init: weights of another run by name, what was not taken, and weights of another size."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from tiny_runs import resume_training, settings

from dist_egnn.commands.train import run_training
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint
from dist_egnn.utils.filesystem import sha256

STILL = ["train.epochs=1", "train.lr=0"]  # best.pt holds the initial weights


@pytest.fixture(scope="module")
def source(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights differ from those of other runs."""
    run = tmp_path_factory.mktemp("source") / "run"
    run_training(settings(small, run, "train.epochs=1", "train.seed=5", "model.layers=2"))
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "best.pt")["model"]


@pytest.mark.parametrize("name", ["", "last.pt"])
def test_all_weights_of_a_run_and_its_identity(small, source, tmp_path, capsys, name):
    run = tmp_path / "run"
    run_training(settings(small, run, f"train.init={source / name}", *STILL, "model.layers=2", "data.horizon=4"))
    stored = checkpoint.load(source / (name or "best.pt"))["model"]
    assert all(torch.equal(value, stored[key]) for key, value in weights(run).items())
    shown = capsys.readouterr().out
    assert "not there" not in shown
    assert "other settings there: data.horizon=3 (here 4)\n" in shown
    origin = {"path": str(source / name), "weights": sha256(source / (name or "best.pt"))}
    resume_training(run, ["train.epochs=2"])
    assert checkpoint.load(run / "last.pt")["init"] == origin
    assert [entry["init"] for entry in yaml.safe_load((run / "about.yaml").read_text())] == [origin, origin]


def test_weights_that_do_not_fit_are_drawn_and_listed(small, source, tmp_path, capsys):
    more = [*STILL, "model.layers=3", "data.features=[mass]", "model.name=EGNN"]
    run_training(settings(small, tmp_path / "plain", *more))
    capsys.readouterr()
    run_training(settings(small, tmp_path / "run", *more, f"train.init={source}"))
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[3:]]
    assert ["embedding", "4", "embedding.weight: (4, 3) there, (4, 1) here; drawn from train.seed"] in rows
    assert ["layers.0", "36", "layers.0.phi_h.0.weight: (4, 13) there, (4, 9) here; drawn from train.seed"] in rows
    assert ["s", "12", "not in this model"] in rows
    stored, fresh, taken = weights(source), weights(tmp_path / "plain"), weights(tmp_path / "run")
    for name, value in taken.items():
        fits = name in stored and stored[name].shape == value.shape
        assert torch.equal(value, (stored if fits else fresh)[name]), name
    assert not torch.equal(taken["layers.1.phi_e.0.weight"], fresh["layers.1.phi_e.0.weight"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.hidden=6"], r"train\.init=.*: weights of model\.hidden=4, not 6; set model\.hidden=4"),
        (["model.virtual_nodes=2"], r"model\.virtual_nodes=3, not 2; set model\.virtual_nodes=3"),
        (["model.name=Linear"], r"no weight fits model\.name=Linear; it has those of FastEGNN"),
        (["train.init=absent"], r"train\.init=.*/absent: .*/absent: no such checkpoint"),
    ],
)
def test_other_sizes_and_a_missing_file_are_refused(small, source, tmp_path, more, message):
    with pytest.raises(Failure, match=message):
        run_training(settings(small, tmp_path / "run", f"train.init={source}", "train.epochs=1", *more))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_two_processes_equal_one(make_store, small, source, tmp_path):
    more = [f"train.init={source}", "train.epochs=1", "partition.halo=exchange", "loss.mmd=0", "train.lr=1e-4"]
    for name, data in (("1", small), ("2", make_store(2))):
        run_training(settings(data, tmp_path / name, *more))
    one, two = (pd.read_csv(tmp_path / name / "metrics.csv")["valid_mse"][0] for name in "12")
    assert two == pytest.approx(one, rel=1e-5)
