"""The identity of data: what changes it, and that runs, stores and resumes carry and compare it."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from small_data import DATA
from tiny_runs import resume_training, settings

from dist_egnn.commands import evaluate, sweep_config
from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.config import Data
from dist_egnn.data import identity, trajectories
from dist_egnn.data.store import Store
from dist_egnn.errors import Failure
from dist_egnn.evaluate import rollout
from dist_egnn.train import checkpoint, run_dir
from dist_egnn.utils.filesystem import lock_output


def scale(key: str) -> Callable[[h5py.Group], None]:
    def edit(group: h5py.Group) -> None:
        group[key][...] *= 1.5

    return edit


def delete_velocity(group: h5py.Group) -> None:
    del group["velocity"]


def delete_an_edge(group: h5py.Group) -> None:
    pairs = group["edges"][1:]
    del group["edges"]
    group["edges"] = pairs


EDITS: dict[str, Callable[[h5py.Group], None]] = {
    "positions": scale("position"),
    "velocities": scale("velocity"),
    "attribute 'mass'": scale("attributes/mass"),
    "dt": lambda group: group.attrs.update(dt=0.5),
    "box": lambda group: group.create_dataset("box", data=np.float32([[-9, -9, -9], [9, 9, 9]])),
    "edges": delete_an_edge,
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
    data = Data(features=["mass"], edges="given")
    assert identity.changes(before, now, data) == [word]
    assert identity.digest(before) != identity.digest(now) != ""
    tests_only = identity.of_data(edited(small, tmp_path / "b.h5", edit, "test") if word != "velocities" else small)
    assert identity.changes(before, tests_only, data, ("train", "valid")) == []


def test_attributes_that_no_feature_uses_do_not_count(small, tmp_path):
    before, now = map(identity.of_data, (small, edited(small, tmp_path / "a.h5", EDITS["attribute 'mass'"])))
    assert identity.changes(before, now, Data(features=["viscosity/max", "speed"])) == []
    assert identity.changes(before, now, Data(features=["speed"], fixed="mass=1")) == ["attribute 'mass'"]
    assert identity.changes(before, now, Data()) == ["attribute 'mass'"]
    other_edges = identity.of_data(edited(small, tmp_path / "b.h5", EDITS["edges"]))
    assert identity.changes(before, other_edges, Data()) == []


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


def test_the_identity_of_a_large_file_is_kept_until_the_file_changes(small, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "CACHED_BYTES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, hashed = Path(shutil.copy(small, tmp_path / "a.h5")), list[str]()
    os.utime(data, (later := time.time() + 3600, later))
    plain = identity.of_file
    monkeypatch.setattr(identity, "of_file", lambda file: hashed.append(str(file.path)) or plain(file))

    def read() -> str:
        identity._of_data.cache_clear()  # as in another process
        return identity.digest(identity.of_data(data))

    first = read()
    assert (read(), len(hashed)) == (first, 2)  # it may change again within the clock's resolution
    os.utime(data, (0, 0))
    assert [read(), read()] == [first] * 2
    assert len(hashed) == 3
    (record,) = (tmp_path / "cache" / "dist_egnn").iterdir()
    record.write_text("{")
    assert (read(), len(hashed)) == (first, 4)
    edited(data, tmp_path / "b.h5", scale("velocity")).replace(data)  # of the same size
    os.utime(data, (0, 0))
    assert read() != first


def test_a_store_of_an_older_version_is_read_with_a_warning(make_store, tmp_path, capsys):
    store = Path(shutil.copytree(make_store(2), tmp_path / "store"))
    manifest = (store / "manifest.yaml").read_text()
    (store / "manifest.yaml").write_text(manifest.replace("\ndata:", "\nother:"))
    assert identity.of_data(store) is None
    assert identity.digest(None) == ""
    assert f"warning: {store}" in capsys.readouterr().err
    assert DATA["radius"] == Store(store).inputs["radius"]


@pytest.fixture(scope="module")
def runs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.h5 and run, whose features are all attributes and speed."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(small, folder / "data.h5")
    run_training(settings(folder / "data.h5", folder / "run", "train.epochs=1", "data.features=null"))
    return folder


def rename_mass(group: h5py.Group) -> None:
    group.move("attributes/mass", "attributes/load")


def scale_velocity(group: h5py.Group) -> None:
    group["velocity"][...] *= 3.6


UNFIT: dict[str, Callable[[h5py.Group], None]] = {
    r"has no attribute 'mass' \(it has: load, viscosity\)": rename_mass,
    "stores no velocities": delete_velocity,
    r"dt is 0.5, .* dt 1;": EDITS["dt"],
    r"velocity · dt is 3.\d+ times the displacement, in the data of .* 0.96": scale_velocity,
}


@pytest.mark.parametrize(("message", "edit"), UNFIT.items())
def test_data_that_do_not_fit_the_run_are_refused(small, runs, tmp_path, message, edit):
    other, options = edited(small, tmp_path / "other.h5", edit), {"trajectory": 3, "steps": 1}
    with pytest.raises(Failure, match=rf"other\.h5: {message}"):
        rollout.prepare(runs / "run", data=other, out=tmp_path / "a.vtkhdf", **options)
    with pytest.raises(Failure, match=rf"other\.h5: {message}"):
        run_evaluation(runs / "run", data=other)


def test_null_features_are_those_of_the_training(small, runs, tmp_path):
    def add(group: h5py.Group) -> None:
        group["attributes/another"] = group["attributes/mass"][()]

    more = edited(small, tmp_path / "more.h5", add)
    job = rollout.prepare(runs / "run", data=more, trajectory=3, steps=1, out=tmp_path / "a.vtkhdf")
    assert job.spec.features == ("mass", "viscosity", "speed")
    assert run_evaluation(runs / "run", data=more) == run_evaluation(runs / "run")


def test_evaluate_other_data(small, runs, tmp_path):
    run = Path(shutil.copytree(runs / "run", tmp_path / "a" / "run"))
    (run / "evaluate.csv").unlink(missing_ok=True)
    shutil.copy(small, tmp_path / "a" / "data.h5")
    other = edited(small, tmp_path / "other.h5", lambda group: group["position"].__setitem__(-1, group["position"][0]))
    own, errors = run_evaluation(run), run_evaluation(run, data=other)
    assert run_evaluation(run, data=other) == errors != own
    table = pd.read_csv(run / "evaluate.csv")
    by_data = {name: dict(rows[["prediction", "mse"]].values) for name, rows in table.groupby("data")}
    assert by_data == {identity.digest(identity.of_data(path)): e for path, e in ((small, own), (other, errors))}


def test_two_writers_of_evaluate_csv(tmp_path, capsys, monkeypatch):
    """The second one waits for the first; a damaged table is replaced."""

    def write(split: str) -> list[str]:
        evaluate._write(tmp_path, pd.DataFrame([{"split": split, "prediction": "linear", "mse": 1.0, "data": "a"}]))
        return pd.read_csv(path)["split"].tolist()

    path = tmp_path / "evaluate.csv"
    for content in (b"", b"\x00" * 20, b"a,b\n1,2\n"):
        path.write_bytes(content)
        assert write("valid") == ["valid"]
    with lock_output(path):
        monkeypatch.setattr(evaluate, "LOCK_WAIT_S", 0)
        assert write("train") == ["valid"]
        monkeypatch.setattr(evaluate, "LOCK_WAIT_S", 60)
        thread = threading.Thread(target=write, args=["test"])
        thread.start()
    assert f"warning: {path}: another process is writing it" in capsys.readouterr().err
    thread.join()
    assert pd.read_csv(path)["split"].tolist() == ["valid", "test"]


def test_a_run_of_two_parts_evaluates_a_file_on_two_parts(small, make_store, tmp_path):
    run_training(settings(make_store(2), tmp_path / "run", "train.epochs=1"))
    assert run_evaluation(tmp_path / "run", data=small) == run_evaluation(tmp_path / "run")


def test_a_run_and_its_data_can_be_moved_and_copied(runs, tmp_path):
    expected = run_evaluation(runs / "run")
    copied = Path(shutil.copytree(runs, tmp_path / "copied"))
    first = Path(shutil.copytree(runs, tmp_path / "first"))
    edited(first / "data.h5", copied / "data.h5", scale("position"))
    assert run_dir.load_config(copied / "run").data.path == str(copied / "data.h5")
    with pytest.raises(Failure, match=rf"{copied / 'data.h5'}: .*positions"):
        run_evaluation(copied / "run")
    (copied / "data.h5").unlink()  # the data stay where they were
    assert run_evaluation(copied / "run") == expected == run_evaluation(first / "run")


def test_a_sweep_over_changed_data_names_the_runs(small, tmp_path, monkeypatch):
    data = Path(shutil.copy(small, tmp_path / "a.h5"))
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("data: {radius: 0.27, path: a.h5}\n", encoding="utf-8")
    file = Path("sweep.yaml")
    file.write_text(
        "config: c.yaml\nout: out\nset: {}\ngrids:\n  - keys: {model.name: [EGNN]}\nseeds: [0, 1]\n", encoding="utf-8"
    )
    sweep = sweep_config.load(file)
    digests = [identity.digest(identity.of_data(path)) for path in (small, edited(small, data, scale("velocity")))]
    for run, digest in zip(sweep.runs, digests, strict=True):
        run.folder.mkdir(parents=True)
        (run.folder / "result.json").write_text(json.dumps({"data": digest}))
        if run is sweep.runs[0]:
            sweep_config.check_same_data(sweep)
    with pytest.raises(Failure, match=r"a\.h5 has changed .*rm -r out/name=EGNN,seed=0$"):
        sweep_config.check_data(sweep)
    with pytest.raises(Failure, match=r"rm -r out/name=EGNN,seed=0 out/name=EGNN,seed=1$"):
        sweep_config.check_same_data(sweep)
