"""dist_egnn.fit on arrays and files, and the loop of docs/training.md."""

from __future__ import annotations

import re
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import falling_swirl, random_pairs
from tiny_runs import assert_same, settings

import dist_egnn
from dist_egnn import config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def arrays() -> list[dict[str, Any]]:
    """The trajectories of the fixture ``small``."""
    result = []
    for seed, (nodes, split) in enumerate([(200, "train"), (250, "train"), (220, "valid"), (210, "test")]):
        position, velocity, attributes = falling_swirl(nodes, seed)
        given = {"position": position, "velocity": velocity, "attributes": attributes}
        result.append({**given, "edges": random_pairs(nodes, seed), "split": split, "dt": 1.0})
    return result


def test_fit_equals_a_training_by_command(small, tmp_path):
    run_training(settings(small, tmp_path / "command", "train.epochs=1"))
    chosen = settings(Path("unused"), tmp_path / "arrays", "train.epochs=1")
    before = config.to_yaml(chosen)
    assert dist_egnn.fit(chosen, arrays()) == tmp_path / "arrays"
    assert config.to_yaml(chosen) == before
    assert_same(tmp_path / "arrays", tmp_path / "command")
    (tmp_path / "my.yaml").write_text(config.to_yaml(replace(chosen, run=config.Run(str(tmp_path / "file")))))
    assert_same(dist_egnn.fit(tmp_path / "my.yaml", small), tmp_path / "command")
    with pytest.raises(Failure, match="holds a run already"):
        dist_egnn.fit(chosen, arrays()[:3])


@pytest.mark.parametrize(
    ("keys", "trajectories", "message"),
    [
        ({"train.epoch": 1}, None, r"unknown key 'train\.epoch'; did you mean train\.epochs"),
        ({"train.epochs": 0}, None, r"train\.epochs=0: must be at least 1"),
        ({}, None, r"data\.path is not set"),
        ({}, [{"position": np.zeros((3, 2, 3)), "dt": 1.0}], r"^trajectories\[0\]: missing .*'split'; pass position"),
        ({}, [{"position": np.zeros((3, 2, 3)), "dt": 1.0, "split": "train", "mass": 1}], r"'mass'; pass position"),
    ],
)
def test_what_fit_refuses(tmp_path, keys, trajectories, message):
    with pytest.raises(Failure, match=message) as caught:
        dist_egnn.fit({"run.dir": str(tmp_path / "run"), **keys}, trajectories)
    assert "\n" not in str(caught.value)


def test_values_by_key():
    values = {"data.features": ["mass", "speed"], "data.radius": float("inf"), "train.lr": 1e-05}
    values |= {"data.periodic": True, "data.gravity": None, "train.epochs": 3, "run.dir": Path("a b")}
    chosen = dist_egnn.load_config(None, values)
    assert {key: attrgetter(key)(chosen) for key in values} == {**values, "run.dir": "a b"}


def test_the_code_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, loop = [code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "wandb" not in code]
    names: dict[str, Any] = {}
    exec(first, names)
    x = names["x0"][0]
    assert names["predict"](x, np.zeros_like(x)).shape == (60, 3)
    exec(loop, names)
    assert np.isfinite(names["loss"].item())
    weights = checkpoint.load(tmp_path / "runs" / "mine" / "best.pt")["model"]
    assert all(torch.equal(value, weights[name]) for name, value in names["model"].state_dict().items())
    assert run_evaluation(Path("runs/mine"))["FastEGNN"] > 0
    model, config, samples = (names[name] for name in ("model", "config", "samples"))
    with pytest.raises(Failure, match="runs/mine: holds a run already"):
        dist_egnn.save(model, config, samples)
    config.model.hidden = 16
    with pytest.raises(
        Failure, match=r"runs/mine: its weights do not fit this model: .*; set the config's model section"
    ):
        dist_egnn.save(model, config, samples)
