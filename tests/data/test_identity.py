"""The identity of data: what changes it, and that runs, stores and resumes carry and compare it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from small_data import DATA
from tiny_runs import resume_training, settings

from dist_egnn.commands.train import run_training
from dist_egnn.config import Data
from dist_egnn.data import identity, trajectories
from dist_egnn.data.store import Store
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint


def scale(key: str) -> Callable[[h5py.Group], None]:
    def edit(group: h5py.Group) -> None:
        group[key][...] *= 1.5

    return edit


def delete_velocity(group: h5py.Group) -> None:
    del group["velocity"]


EDITS: dict[str, Callable[[h5py.Group], None]] = {
    "positions": scale("position"),
    "velocities": scale("velocity"),
    "attribute 'mass'": scale("attributes/mass"),
    "dt": lambda group: group.attrs.update(dt=0.5),
    "box": lambda group: group.create_dataset("box", data=np.float32([[-9, -9, -9], [9, 9, 9]])),
    "gravity": lambda group: group.attrs.update(gravity=[0, 0, -1.0]),
}


def edited(small: Path, out: Path, edit: Callable[[h5py.Group], None], *splits: str) -> Path:
    """A copy of the file in which the trajectories of some splits (none: of all) are edited."""
    shutil.copy(small, out)
    with h5py.File(out, "r+") as file:
        for group in file["trajectories"].values():
            if not splits or group.attrs["split"] in splits:
                edit(group)
    return out


@pytest.mark.parametrize(("word", "edit"), [*EDITS.items(), ("velocities", delete_velocity)])
def test_changes_name_the_component(small, tmp_path, word, edit):
    before, now = map(identity.of_data, (small, edited(small, tmp_path / "a.h5", edit)))
    data = Data(features=["mass"])
    assert identity.changes(before, now, data) == [word]
    assert identity.digest(before) != identity.digest(now) != ""
    tests_only = identity.of_data(edited(small, tmp_path / "b.h5", edit, "test") if word != "velocities" else small)
    assert identity.changes(before, tests_only, data, ("train", "valid")) == []


def test_attributes_that_no_feature_uses_do_not_count(small, tmp_path):
    before, now = map(identity.of_data, (small, edited(small, tmp_path / "a.h5", EDITS["attribute 'mass'"])))
    assert identity.changes(before, now, Data(features=["viscosity/max", "speed"])) == []
    assert identity.changes(before, now, Data(features=["speed"], fixed="mass=1")) == ["attribute 'mass'"]
    assert identity.changes(before, now, Data()) == ["attribute 'mass'"]


def test_the_same_values_have_the_same_digest_however_they_are_stored(small, make_store, tmp_path, monkeypatch):
    def rewrite(group: h5py.Group) -> None:
        values = group["position"][()].astype(np.float64)
        del group["position"]
        group["position"] = values  # contiguous, without compression

    expected = identity.of_data(small)
    assert expected["attributes"] == {"mass": 1, "viscosity": 1}
    assert expected["velocity"]
    assert expected["dt"] == [1.0]
    assert Store(make_store(2)).manifest["data"] == expected
    monkeypatch.setattr(trajectories, "BLOCK", 4 * 250 * 3)
    file = trajectories.Trajectories(edited(small, tmp_path / "a.h5", rewrite))
    assert [len(block) for block in file.blocks(1, "position")] == [4, 4, 4, 2]
    assert identity.of_file(file) == expected


@pytest.mark.parametrize("word", ["velocities", "attribute 'mass'"])
def test_a_resume_refuses_changed_data_and_names_the_change(small, tmp_path, word):
    data = Path(shutil.copy(small, tmp_path / "a.h5"))
    run_training(settings(data, tmp_path / "run", "train.epochs=1"))
    assert checkpoint.load(tmp_path / "run" / "best.pt")["data"] == identity.of_data(small)
    edited(small, data, EDITS[word], "test")
    resume_training(tmp_path / "run", ["train.epochs=2"])
    edited(small, data, EDITS[word], "valid")
    with pytest.raises(Failure, match=rf"a\.h5: .*{word};"):
        resume_training(tmp_path / "run", ["train.epochs=3"])


def test_a_store_of_an_older_version_is_read_with_a_warning(make_store, tmp_path, capsys):
    store = Path(shutil.copytree(make_store(2), tmp_path / "store"))
    manifest = (store / "manifest.yaml").read_text()
    (store / "manifest.yaml").write_text(manifest.replace("\ndata:", "\nother:"))
    assert identity.of_data(store) is None
    assert identity.digest(None) == ""
    assert f"warning: {store}" in capsys.readouterr().err
    assert DATA["radius"] == Store(store).inputs["radius"]
