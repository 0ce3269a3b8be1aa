"""Commands where streams, TMPDIR, locale or the calling script are not those of a developer's terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tiny_runs import settings

from dist_egnn import config

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
DISTEGNN = f"{sys.executable} -m dist_egnn.cli"


def shell(command: str, cwd: Path, text: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env={**os.environ, **env},
        input=text.encode(),
        capture_output=True,
        timeout=500,
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
