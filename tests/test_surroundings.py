"""Commands where streams, TMPDIR, locale or the calling script are not those of a developer's terminal."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pandas as pd
import pytest
from tiny_runs import settings

from dist_egnn import config
from dist_egnn.commands.train import run_training
from dist_egnn.data.trajectories import Trajectories
from dist_egnn.errors import Failure
from dist_egnn.utils import filesystem, hdf5

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
DISTEGNN = f"{sys.executable} -m dist_egnn.cli"


def shell(command: str, cwd: Path, text: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env={**os.environ, **env},
        input=text.encode(),
        capture_output=True,
        timeout=600,
    )


def write_config(data: Path, folder: Path, *more: str) -> None:
    content = config.to_yaml(settings(data, Path("run"), "train.epochs=2", *more))
    (folder / "my.yaml").write_text(content, encoding="utf-8")


def test_training_goes_on_without_streams_in_any_locale_and_temporary_folder(small, tmp_path):
    temporary = tmp_path / ("t" * 120)
    temporary.mkdir()
    write_config(small, tmp_path, "partition.parts=2")
    done = shell(f"{DISTEGNN} train my.yaml >/dev/full 2>&-", tmp_path, TMPDIR=str(temporary), **ASCII)
    assert (done.returncode, len(pd.read_csv(tmp_path / "run" / "metrics.csv"))) == (0, 2)
    assert [*temporary.glob("dist_egnn-*")] == []


SPEAKS = "import os, sys; from dist_egnn.utils.console import guard_streams; guard_streams(); "
SPEAKS += "[print('\\xe9\\u2192', file=f, flush=True) for f in (sys.stdout, sys.stderr) for _ in range(9)]; "
SPEAKS += "open('whole', 'w').write(repr([os.path.exists(f'/proc/self/fd/{k}') for k in (0, 1, 2)]))"


@pytest.mark.parametrize("streams", [">/dev/full 2>&1", "2>&1 | true", "0<&- >&- 2>&-", "2>&-"])
def test_a_process_outlives_its_streams(tmp_path, streams):
    done = shell(f'set -o pipefail; {sys.executable} -c "$CODE" {streams}', tmp_path, CODE=SPEAKS, **ASCII)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "whole").read_text(encoding="utf-8") == "[True, True, True]"


def test_a_result_that_standard_output_loses_is_an_error(tmp_path):
    done = shell(f"{DISTEGNN} config >/dev/full", tmp_path)
    assert (done.returncode, done.stderr.startswith(b"error: standard output: ")) == (2, True)
    assert shell(f"set -o pipefail; {DISTEGNN} config | true", tmp_path).returncode == 0


def test_the_config_is_the_same_in_any_locale(tmp_path):
    expected = config.to_yaml(config.load(None)).encode("ascii")
    for env in (ASCII, {"PYTHONIOENCODING": "iso-8859-1"}):
        assert shell(f"{DISTEGNN} config", tmp_path, **env).stdout == expected


SCRIPT = """
from dist_egnn.commands.train import run_training
from dist_egnn.config import load
run_training(load("my.yaml"))
"""


def test_a_script_without_a_main_guard_or_file_trains(small, tmp_path):
    write_config(small, tmp_path, "partition.parts=2")
    done = shell(f"{sys.executable} -", tmp_path, SCRIPT)
    assert (done.returncode, len(pd.read_csv(tmp_path / "run" / "metrics.csv"))) == (0, 2), done.stderr


def test_a_file_system_without_locks(small, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    plain = h5py.File
    monkeypatch.setattr(filesystem.fcntl, "flock", refuse)
    monkeypatch.setattr(
        hdf5.h5py, "File", lambda *given, **more: plain(*given, **more) if more.get("locking") is False else refuse()
    )
    with filesystem.lock_folder(tmp_path / "run", "busy"):
        assert len(Trajectories(small)) == 4
        with pytest.raises(Failure, match="run: busy"), filesystem.lock_folder(tmp_path / "run", "busy"):
            pass


def test_what_is_not_damage_is_not_called_damage(small, tmp_path):
    path = Path(shutil.copy(small, tmp_path / "copy.h5"))
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as HDF5 does where it writes
        with pytest.raises(Failure, match=r"copy\.h5: another program has it open to write; close it"):
            Trajectories(path)
    with h5py.File(path, "r+") as file:
        del file["trajectories/000000/velocity"]
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_chunk((14, 200, 3))
        created.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (1,))
        space = h5py.h5s.create_simple((14, 200, 3))
        h5py.h5d.create(
            file["trajectories/000000"].id, b"velocity", h5py.h5t.NATIVE_FLOAT, space, created
        ).write_direct_chunk((0, 0, 0), b"whole")
    with pytest.raises(
        Failure, match=r"copy\.h5: trajectory 0: 'velocity': .* filter is not installed .*HDF5_PLUGIN_PATH"
    ):
        Trajectories(path).velocity(0, 0)


FORK = """
import os, signal, torch, dist_egnn.ops.message_passing
torch.set_num_threads(2)
ones = torch.ones(1 << 20)
(ones + ones).sum()
if not os.fork():
    signal.alarm(600)
    (ones + ones).sum()
    os._exit(torch.get_num_threads())
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_forked_child_computes_with_one_thread(tmp_path):
    assert shell(f"{sys.executable} -", tmp_path, FORK).stdout == b"1\n"


def test_training_without_edges_says_so(small, tmp_path, capsys):
    run_training(settings(small, tmp_path / "run", "train.epochs=1", "train.warmup=0", "data.radius=1e-6"))
    assert "the first training snapshot has no edges; raise data.radius=1e-06" in capsys.readouterr().err
