"""A run's folder that is damaged, half there, full, read-only, newer, or in use; and what stands in about.yaml."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from small import DATA
from tiny_runs import PLAIN_STEPS, assert_same, settings

from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import resume_training, run_training
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint, metrics_log, provenance, trainer
from dist_egnn.utils import filesystem

EPOCHS = "train.epochs=4"


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_training(settings(small, folder, EPOCHS))
    return folder


@pytest.fixture(scope="module")
def two(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as it was at the end of its second epoch."""
    folder = tmp_path_factory.mktemp("two") / "run"
    given = settings(small, folder, EPOCHS)

    def steps(*arguments: object):
        if arguments[-1].epoch == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        yield from PLAIN_STEPS(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "steps", steps)
        with pytest.raises(KeyboardInterrupt):
            run_training(given)
    return folder


@pytest.fixture
def run(two: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(two, tmp_path / "run"))


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0, 0.01, 0.3, 0.5, 0.7, 0.9, 0.99, 1])
def test_a_flipped_bit_is_seen(run, place):
    flip(run / "last.pt", place)
    with pytest.raises(checkpoint.Damaged, match=r"last\.pt: damaged"):
        checkpoint.load(run / "last.pt")


def test_anyone_can_read_a_checkpoint(run):
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["format"] == "dist_egnn.checkpoint"
    assert (state["epoch"], state["step"]) == (2, 0)


SPOILED: dict[str, Callable[[Path], object]] = {
    r"damaged: its sha256": lambda last: flip(last, 0.5),
    r"damaged or not a checkpoint": lambda last: os.truncate(last, last.stat().st_size // 2),
    r"damaged: its end is missing": lambda last: os.truncate(last, last.stat().st_size - 1),
    r"no such checkpoint": lambda last: last.unlink(),  # killed between two renames
}


@pytest.mark.parametrize("says", SPOILED)
def test_the_checkpoint_before_is_taken(run, whole, capsys, says):
    SPOILED[says](run / "last.pt")
    before = (run / "previous.pt").read_bytes()
    assert checkpoint.load(run / "previous.pt")["step"] == 3  # checkpoint_minutes=0: after the last step of epoch 1
    resume_training(run, ["train.epochs=1"])  # over: it only mends
    assert (run / "previous.pt").read_bytes() == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {run}/last.pt: ")
    assert line.endswith(f"; resuming from {run}/previous.pt (epoch 1, step 3)")
    assert says.split()[0] in line
    resume_training(run, [EPOCHS])
    assert_same(run, whole)


HALF: dict[str, Callable[[Path], object]] = {
    r"not a run \(no config\.yaml\)": lambda run: (run / "config.yaml").unlink(),
    r"last\.pt: no such checkpoint": lambda run: [(run / f"{n}.pt").unlink() for n in ("last", "previous")],
    r"last\.pt: damaged.*; and .*previous\.pt: damaged": lambda run: [
        flip(run / f"{n}.pt", 0.5) for n in ("last", "previous")
    ],
    r"best\.pt: missing": lambda run: (run / "best.pt").unlink(),
    r"metrics\.csv: has 0 of 2 epochs": lambda run: (run / "metrics.csv").unlink(),
    r"metrics\.csv: has 1 of 2 epochs": lambda run: (run / "metrics.csv").write_text("epoch\n0\n"),
    r"metrics\.csv: not the metrics of a run": lambda run: (run / "metrics.csv").write_bytes(b"\0\0"),
    r"last\.pt: not a checkpoint of dist_egnn": lambda run: torch.save({"a": 1}, run / "last.pt"),
}


@pytest.mark.parametrize("says", HALF)
def test_a_run_that_is_half_there_is_refused(run, says):
    HALF[says](run)
    kept = {f.name: f.read_bytes() for f in run.iterdir() if f.is_file()}
    with pytest.raises(Failure, match=says):
        resume_training(run, [])
    assert {f.name: f.read_bytes() for f in run.iterdir() if f.is_file()} == kept


def test_a_new_run_overwrites_nothing(run, small):
    for gone in ("nothing", "config.yaml", "last.pt", "previous.pt", "best.pt"):
        (run / gone).unlink(missing_ok=True)
        says = "holds a run already" if gone == "nothing" else "metrics.csv, but no config.yaml"
        with pytest.raises(Failure, match=says):
            run_training(settings(small, run))
    (run / "metrics.csv").unlink()
    run_training(settings(small, run, "train.epochs=1"))  # nothing was left to lose


def test_a_newer_version_is_not_damage(run, monkeypatch):
    state = checkpoint.load(run / "last.pt")
    monkeypatch.setattr(checkpoint, "VERSION", 3)
    checkpoint.save(run / "last.pt", {k: v for k, v in state.items() if k != "version"})
    monkeypatch.undo()
    with pytest.raises(Failure, match=r"last\.pt: checkpoint version 3, this program reads 2"):
        resume_training(run, [])
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "future: {key: 1}\n")
    with pytest.raises(Failure, match=r"config\.yaml: unknown key 'future'"):
        resume_training(run, [])


def test_a_checkpoint_of_version_1_goes_on(run, whole):
    """As it was written at the end of every epoch, with a torch scheduler and without a checksum."""
    state = checkpoint.load(run / "last.pt")
    old = {k: state[k] for k in ("format", "model", "optimizer", "rng", "best", "waited", "config")}
    torch.save({**old, "version": 1, "epoch": 1, "scheduler": {"last_epoch": 2}}, run / "last.pt")
    resume_training(run, [])
    assert_same(run, whole)


def test_two_runs_in_one_folder(run, small, tmp_path):
    with filesystem.lock_folder(run, "busy"):
        with pytest.raises(Failure, match="run: another run is at work there"):
            resume_training(run, [])
        with (
            filesystem.lock_folder(run, "busy", join=True),
            pytest.raises(Failure, match="run: busy"),
            filesystem.lock_folder(run, "busy"),
        ):
            pass  # those of one run hold it together
    with (
        filesystem.lock_folder(tmp_path / "new", "busy"),
        pytest.raises(Failure, match="new: another run is at work there"),
    ):
        run_training(settings(small, tmp_path / "new"))


@pytest.fixture
def disk(tmp_path: Path):
    """A disk of its own, 3 MB; disk.again(options) mounts it anew."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=3m", *options]), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if platform.system() != "Linux" or shutil.which("mount") is None or not mount():
        pytest.skip("may not mount a tmpfs here")
    try:
        yield folder, mount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_may_only_be_read(run, small, disk, capsys):
    folder, mount = disk
    shutil.copytree(run, folder / "run")
    resume_training(folder / "run", [])
    assert mount("remount", "ro")
    with pytest.raises(Failure, match=r"run: cannot be written \(Read-only file system\)"):
        resume_training(folder / "run", ["train.epochs=5"])
    found = run_evaluation(folder / "run")
    assert found["FastEGNN"] > 0
    says = f"warning: {folder}/run/evaluate.csv: not written (Read-only file system)\n"
    assert capsys.readouterr().err.endswith(says)
    with pytest.raises(Failure, match=r"new: cannot be written \(Read-only file system\)"):
        run_training(settings(small, folder / "new"))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_disk_that_is_full(small, disk, whole, monkeypatch, at):
    """It fills up in one epoch or another; when there is room again, the run goes on."""
    folder, _ = disk

    def steps(*arguments: object):
        for stop in PLAIN_STEPS(*arguments):  # type: ignore[arg-type]
            if arguments[-1].epoch == at:  # type: ignore[attr-defined]
                with (folder / "filler").open("ab", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(4096))
            yield stop

    monkeypatch.setattr(trainer, "steps", steps)
    with pytest.raises(Failure, match=r"cannot be written \(No space left on device\)"):
        run_training(settings(small, folder / "run", EPOCHS, "train.checkpoint_minutes=10"))
    monkeypatch.undo()
    assert not list((folder / "run").glob("*.partial"))
    (folder / "filler").unlink()
    resume_training(folder / "run", [])
    assert_same(folder / "run", whole)
    assert len(metrics_log.rows_before(folder / "run" / "metrics.csv", 9)) == 4


def test_about(two, run):
    (start,) = yaml.safe_load((two / "about.yaml").read_text())
    assert (start["epoch"], start["step"], start["processes"], start["device"]) == (0, 0, 1, "cpu")
    assert start["versions"]["torch"] == torch.__version__
    assert start["versions"]["python"] == platform.python_version()
    assert {"dist_egnn", "dgl"} < set(start["versions"])
    assert start["host"]["name"] == platform.node()
    assert start["seeds"] == {"train": 0, "frames": 0, "partition": 0}
    assert DATA["frames"] == 3
    before = (run / "about.yaml").read_text()
    resume_training(run, ["train.epochs=3"])
    after = (run / "about.yaml").read_text()
    assert after.startswith(before)
    assert [(s["epoch"], s["step"]) for s in yaml.safe_load(after)] == [(0, 0), (2, 0)]


def test_git_state(tmp_path):
    """Of tracked files only; nothing where there is no repository, or one that does not know the folder."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert provenance.git_state(tmp_path) == {}
    git("init")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.py").write_text("1\n")
    assert provenance.git_state(tmp_path / "there") == {}
    git("add", "there")
    git("commit", "-m", "x")
    (tmp_path / "there" / "untracked").touch()
    assert provenance.git_state(tmp_path / "there") == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "there" / "a.py").write_text("2\n")
    assert provenance.git_state(tmp_path / "there")["dirty"] is True
