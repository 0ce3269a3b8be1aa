"""A run's folder that is damaged, incomplete, full, read-only, newer, or in use; and the contents of about.yaml."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import PLAIN_STEPS, assert_same, file_contents, resume_training, settings

from dist_egnn.commands.evaluate import run_evaluation
from dist_egnn.commands.train import run_training
from dist_egnn.errors import Failure
from dist_egnn.train import checkpoint, run_writer, trainer
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

    def steps(training: trainer.Trainer) -> Iterator[bool]:
        if training.state.epoch == 2:
            raise KeyboardInterrupt
        yield from PLAIN_STEPS(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "steps", steps)
        with pytest.raises(KeyboardInterrupt):
            run_training(settings(small, folder, EPOCHS))
    return folder


@pytest.fixture
def run(two: Path, tmp_path: Path) -> Path:
    """A copy of ``two`` to damage."""
    return Path(shutil.copytree(two, tmp_path / "run"))


def flip(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def test_torch_reads_a_checkpoint_and_a_flipped_bit_is_detected(run):
    content = torch.load(run / "last.pt", weights_only=True)
    assert (content["format"], content["epoch"], content["step"]) == ("dist_egnn.checkpoint", 2, 0)
    for position in (0, 0.01, 0.3, 0.5, 0.7, 0.9, 0.99, 1):
        flip(run / "last.pt", position)
        with pytest.raises(checkpoint.Damaged, match=r"last\.pt: damaged"):
            checkpoint.load(run / "last.pt")
        flip(run / "last.pt", position)
    checkpoint.load(run / "last.pt")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "damaged: its sha256": lambda last: flip(last, 0.5),
    "damaged or not a checkpoint": lambda last: os.truncate(last, last.stat().st_size // 2),
    "damaged: its end is missing": lambda last: os.truncate(last, last.stat().st_size - 1),
    "no such checkpoint": lambda last: last.unlink(),  # killed between two renames
}


@pytest.mark.parametrize("message", DAMAGE)
def test_resume_from_the_previous_checkpoint(run, whole, capsys, message):
    DAMAGE[message](run / "last.pt")
    before = (run / "previous.pt").read_bytes()
    assert checkpoint.load(run / "previous.pt")["step"] == 3  # checkpoint_minutes=0: after the last step of epoch 1
    resume_training(run, ["train.epochs=1"])  # finished: only repairs last.pt
    assert (run / "previous.pt").read_bytes() == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {run}/last.pt: {message}")
    assert line.endswith(f"from {run}/previous.pt (epoch 2 after step 3)")
    resume_training(run, [EPOCHS])
    assert_same(run, whole)


BOTH = ("last.pt", "previous.pt")
INCOMPLETE: dict[str, Callable[[Path], object]] = {
    r"not a run .*distegnn train": lambda run: (run / "config.yaml").unlink(),
    r"last\.pt: no such checkpoint": lambda run: [(run / name).unlink() for name in BOTH],
    r"last\.pt: damaged.*; and .*previous\.pt: damaged": lambda run: [flip(run / name, 0.5) for name in BOTH],
    r"best\.pt: missing": lambda run: (run / "best.pt").unlink(),
    r"metrics\.csv: has 0 of 2 epochs": lambda run: (run / "metrics.csv").unlink(),
    r"metrics\.csv: has 1 of 2 epochs": lambda run: (run / "metrics.csv").write_text("epoch\n1\n"),
    r"metrics\.csv: not the metrics of a run": lambda run: (run / "metrics.csv").write_bytes(b"\0\0"),
    r"config\.yaml: unknown key 'future'": lambda run: (run / "config.yaml").open("a").write("future: {key: 1}\n"),
    r"last\.pt: not a checkpoint": lambda run: torch.save({"a": 1}, run / "last.pt"),
}


@pytest.mark.parametrize("message", INCOMPLETE)
def test_an_incomplete_run_is_refused(run, message):
    INCOMPLETE[message](run)
    before = file_contents(run)
    with pytest.raises(Failure, match=message):
        resume_training(run, [])
    assert file_contents(run) == before


def test_a_new_run_overwrites_nothing(run, small):
    for removed in ("nothing", "config.yaml", "last.pt", "previous.pt", "best.pt"):
        (run / removed).unlink(missing_ok=True)
        message = "holds a run already" if removed == "nothing" else "metrics.csv, but no config.yaml"
        with pytest.raises(Failure, match=message):
            run_training(settings(small, run))
    (run / "metrics.csv").unlink()
    run_training(settings(small, run, "train.epochs=1"))


def test_a_newer_version_is_not_damage(run, monkeypatch):
    content = checkpoint.load(run / "last.pt")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 3)
        checkpoint.save(run / "last.pt", {k: v for k, v in content.items() if k != "version"})
    with pytest.raises(Failure, match=r"last\.pt: checkpoint version 3, this program reads 2"):
        resume_training(run, [])


def test_a_checkpoint_of_version_1_can_be_resumed(run, whole):
    """Written at the end of every epoch, with a scheduler of torch and without a checksum."""
    content = checkpoint.load(run / "last.pt")
    old = {k: content[k] for k in ("format", "model", "optimizer", "rng", "best", "waited", "config")}
    torch.save({**old, "version": 1, "epoch": 1, "scheduler": {"last_epoch": 2}}, run / "last.pt")
    resume_training(run, [])
    assert_same(run, whole)


def test_two_runs_in_one_folder(run, small, tmp_path):
    new = tmp_path / "new"
    with filesystem.lock_folder(run, "busy"), filesystem.lock_folder(new, "busy"):
        with pytest.raises(Failure, match="run: another run is at work there"):
            resume_training(run, [])
        with pytest.raises(Failure, match="new: another run is at work there"):
            run_training(settings(small, new))
        with filesystem.lock_folder(run, "busy", join=True), pytest.raises(Failure, match="run: busy"):
            filesystem.lock_folder(run, "busy").__enter__()  # processes of one run share the lock, others do not


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[..., bool]]]:
    """The folder of a file system of 3 MB, and a function that mounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=3m", *options]), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if platform.system() != "Linux" or shutil.which("mount") is None or not mount():
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield folder, mount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_folder(run, small, disk, capsys):
    folder, mount = disk
    shutil.copytree(run, folder / "run")
    resume_training(folder / "run", [])
    assert mount("remount", "ro")
    with pytest.raises(Failure, match=r"run: cannot be written \(Read-only file system\)"):
        resume_training(folder / "run", ["train.epochs=5"])
    assert run_evaluation(folder / "run")["FastEGNN"] > 0
    assert f"warning: {folder}/run/evaluate.csv: cannot be written (Read-only file system)" in capsys.readouterr().err
    with pytest.raises(Failure, match=r"new: cannot be written \(Read-only file system\)"):
        run_training(settings(small, folder / "new"))


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_full_disk(small, disk, whole, monkeypatch, epoch):
    """The disk fills up in one epoch; after space has been freed, the run can be resumed."""
    folder, _ = disk

    def steps(training: trainer.Trainer) -> Iterator[bool]:
        for stop in PLAIN_STEPS(training):
            if training.state.epoch == epoch:
                with (folder / "filler").open("ab", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(4096))
            yield stop

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "steps", steps)
        with pytest.raises(Failure, match=r"cannot be written \(No space left on device\)"):
            run_training(settings(small, folder / "run", EPOCHS, "train.checkpoint_minutes=10"))
    assert not list((folder / "run").glob("*.partial"))
    (folder / "filler").unlink()
    resume_training(folder / "run", [])
    assert_same(folder / "run", whole)
    assert len(checkpoint.first_rows(folder / "run" / "metrics.csv", 9)) == 4


def test_about(run):
    before = (run / "about.yaml").read_text()
    (start,) = yaml.safe_load(before)
    assert (start["epoch"], start["step"], start["processes"], start["device"]) == (1, 0, 1, "cpu")
    assert start["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(start["versions"]) == {"torch", "python", "dist_egnn", "dgl", "numpy"}
    assert start["seeds"] == {"train": 0, "frames": 0, "partition": 0}
    resume_training(run, ["train.epochs=3"])
    after = (run / "about.yaml").read_text()
    assert after.startswith(before)
    assert [(s["epoch"], s["step"]) for s in yaml.safe_load(after)] == [(1, 0), (3, 0)]


def test_git_state(tmp_path):
    """Of tracked files only; empty without a repository, and for a folder that it does not track."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    folder = tmp_path / "folder"
    folder.mkdir()
    assert run_writer.git_state(folder) == {}
    git("init")
    (folder / "a.py").write_text("1\n")
    assert run_writer.git_state(folder) == {}
    git("add", "folder")
    git("commit", "-m", "x")
    (folder / "untracked").touch()
    assert run_writer.git_state(folder) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (folder / "a.py").write_text("2\n")
    assert run_writer.git_state(folder)["dirty"] is True
