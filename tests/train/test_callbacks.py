"""train.callbacks: called with each epoch's row and the model, on rank 0; errors in one line."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from tiny_runs import assert_same, resume_training, settings

from dist_egnn.commands.train import run_training
from dist_egnn.errors import Failure

CODE = """
import json, pathlib, torch

def log(row, model):
    torch.rand(1)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    with pathlib.Path("rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\\n")

def fail(row, model):
    if row["epoch"] == 2 and not pathlib.Path("corrected").exists():
        raise ValueError("no\\naccount")

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the module."""
    (tmp_path / "logging_of_mine.py").write_text(CODE)
    (tmp_path / "broken_code.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_callback_receives_each_row_once_and_changes_nothing(small, make_store, tmp_path, parts):
    data, more = small if parts == 1 else make_store(2), ["train.epochs=2", "train.ema=0.5"]
    run_training(settings(data, tmp_path / "run", *more, "train.callbacks=[logging_of_mine:log]"))
    rows, table = pd.read_json("rows.jsonl", lines=True), pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert rows["epoch"].tolist() == [1, 2]
    assert rows["valid_mse"].tolist() == pytest.approx(table["valid_mse"].tolist())
    assert {*rows} == {*table, "parameters"}
    if parts == 1:
        run_training(settings(data, tmp_path / "plain", *more))
        assert_same(tmp_path / "run", tmp_path / "plain")


def test_a_callback_that_raises_ends_the_training_after_the_epoch_is_saved(small, tmp_path):
    run = tmp_path / "run"
    message = rf"logging_of_mine:fail: ValueError: no \(at the end of epoch 2, .*distegnn train --resume {run}$"
    with pytest.raises(Failure, match=message):
        run_training(settings(small, run, "train.epochs=3", "train.callbacks=[logging_of_mine:fail]"))
    Path("corrected").touch()
    resume_training(run, [])
    assert pd.read_csv(run / "metrics.csv")["epoch"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module:f", "cannot import absent_module .*install it"),
        ("broken_code:f", "cannot import broken_code"),
        ("logging_of_mine:absent", "no function of that name; write MODULE:FUNCTION"),
        ("logging_of_mine:number", "no function of that name"),
        ("my/code.py:f", r"write PACKAGE\.MODULE:FUNCTION"),
    ],
)
def test_a_callback_that_cannot_be_imported_is_refused_before_the_training(small, tmp_path, name, message):
    with pytest.raises(Failure, match=rf"^train\.callbacks={name}: .*{message}"):
        run_training(settings(small, tmp_path / "run", f"train.callbacks=[{name}]"))
    assert not (tmp_path / "run").exists()
