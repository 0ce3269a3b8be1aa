"""Imported data on the whole way to a rollout: every format in this process, one by the commands of the README."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gns_files import framed, needs_records, record
from test_import import FORMATS, KIND, WRAPPED, T, convert, write_csv

from dist_egnn import Rollout, config
from dist_egnn.commands.partition import run_partition
from dist_egnn.commands.train import run_training
from dist_egnn.commands.verify import run_verification
from dist_egnn.evaluate.rollout import run_rollout


def write_tfrecord(folder: Path) -> list[Path]:
    meta = {"bounds": [[0, 1]] * 3, "dt": 0.1, "sequence_length": T - 1, "periodic_boundary_conditions": [True] * 3}
    (folder / "metadata.json").write_text(json.dumps(meta))
    for split in ("train", "valid", "test"):
        (folder / f"{split}.tfrecord").write_bytes(framed(record(0, KIND, WRAPPED.astype("f4"))))
    return [folder]


@pytest.mark.parametrize("name", [*FORMATS, pytest.param("tfrecord", marks=needs_records)])
def test_every_format_to_a_rollout(name: str, tmp_path: Path) -> None:
    """A file by another writer: imported, partitioned, verified, trained for two epochs on two processes, rolled out."""
    write, given = FORMATS.get(name, (write_tfrecord, {}))
    (tmp_path / "in").mkdir()
    file = tmp_path / "m.h5"
    data = convert(write(tmp_path / "in"), file, **given)
    keys = [f"data.path={tmp_path / 'm.h5'}", "data.radius=0.4", "data.horizon=1", "partition.parts=2"]
    keys += [f"data.periodic={str(data[0].periodic).lower()}", "model.hidden=16", "model.layers=1", "train.epochs=2"]
    run_partition(config.load(None, keys), tmp_path / "store")
    made = config.load(None, [*keys[1:3], *keys[4:], f"data.path={tmp_path / 'store'}", f"run.dir={tmp_path / 'run'}"])
    run_verification(tmp_path / "store", made)
    run_training(made)
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 1 + 2  # epochs
    test = next(k for k, trajectory in enumerate(data) if trajectory.split == "test")
    run_rollout(tmp_path / "run", data=file, trajectory=test, steps=1, out=tmp_path / "o.vtkhdf")
    with Rollout(tmp_path / "o.vtkhdf") as rollout:
        first, second = rollout
        assert np.isfinite(second.position).all()
        assert 0 < np.abs(second.position - first.position).max() < 0.5
        assert second.error is not None


def test_command_to_rollout(tmp_path: Path, distegnn: Path) -> None:
    """The three commands of the README on imported data, and a second import over the first."""
    write_csv(tmp_path)
    text = (
        "{path: store, radius: 0.4, horizon: 1}\nmodel: {hidden: 8, layers: 1}\ntrain: {epochs: 2}\nrun: {dir: run}\n"
    )
    (tmp_path / "my.yaml").write_text(f"data: {text}")
    for words in (
        ["import", "a.csv", "--out", "m.h5", "--split", "0.6,0.2,0.2"],
        ["import", "a.csv", "--out", "m.h5", "--split", "0.5,0.25,0.25"],
        ["partition", "m.h5", "--parts", "2", "--out", "store", "--config", "my.yaml"],
        ["verify", "store"],
        ["train", "my.yaml"],
        ["rollout", "run", "--data", "m.h5", "--trajectory", "2", "--steps", "2", "--out", "o.vtkhdf"],
    ):
        done = subprocess.run([distegnn, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (words, done.stderr)
    assert (tmp_path / "o.vtkhdf").exists()
