"""`distegnn doctor`: finds problems, names their remedies, and ends in bounded time whatever hangs or crashes."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import build_native
import dgl
import pytest
import torch
from typer.testing import CliRunner

from dist_egnn import cli
from dist_egnn.distributed import spawn
from dist_egnn.errors import Failure
from dist_egnn.ops import message_passing
from dist_egnn.ops.native import library
from dist_egnn.planning import doctor
from dist_egnn.planning.doctor import Finding


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    assert bool(finding.remedy) == (finding.state == "problem")
    assert "\n" not in finding.text + finding.remedy
    return finding


def test_problems_have_their_remedy_and_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Mock(side_effect=OSError("no such thing"), __name__="check_broken")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [Finding("a", "fine")], broken))
    ran = CliRunner().invoke(cli.app, ["doctor"])
    assert ran.exit_code == 1
    assert "ok      a: fine\nPROBLEM broken: could not be checked: OSError: no such thing\n        → " in ran.output
    assert ran.output.endswith("1 problem\n")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [Finding("a", "fine"), Finding("b", "so", "note")],))
    ran = CliRunner().invoke(cli.app, ["doctor"])
    assert (ran.exit_code, ran.output) == (0, "ok      a: fine\nnote    b: so\nall well\n")


def test_versions_against_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        return {"dgl": "0.9", "protobuf": "3.0"}.get(name) or installed("absent" if name == "numba" else name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    findings = doctor.check_versions()
    by_check = {one.check: one for one in findings}
    assert by_check["python"].state == "ok"
    wrong = only([one for one in findings if one.check == "versions"])
    needed = f"dgl=={installed('dgl')}"
    assert (wrong.text, wrong.remedy) == (f"dgl 0.9 is installed, {needed[3:]} is needed", f"pip install '{needed}'")
    assert by_check["extra nbody"].state == "note"
    assert "without numba (recipes/nbody" in by_check["extra nbody"].text
    assert by_check["extra water3d"].remedy == "pip install 'protobuf<8,>=4.25'"
    assert "is not installed" in only(doctor.check_versions("surely-not-installed")).text
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.13.1")
    assert "Python 3.11 or 3.12" in doctor.check_versions()[0].remedy


def test_threads_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, cores, problem in (("1", 2, 0), ("2", 2, 0), ("3", 2, 1), ("1", 0.5, 0), ("", 2, 0), ("x", 2, 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.setattr(doctor.resources, "available_cores", lambda cores=cores: cores)
        assert only(doctor.check_threads()).remedy == "export OMP_NUM_THREADS=1" * problem
    for free, state in ((5e9, "ok"), (5e8, "problem")):
        monkeypatch.setattr(doctor.memory, "available_memory", lambda free=free: free)
        assert only(doctor.check_memory()).state == state
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))
    assert only(doctor.check_disk()).check == "disk"
    monkeypatch.setattr(doctor, "MIN_DISK", math.inf)
    assert "run.dir" in only(doctor.check_disk()).remedy
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written" in only(doctor.check_disk()).text


def test_stale_files_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fresh").touch()
    for name in ("stale", "open"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    with open(tmp_path / "open", encoding="utf-8"):
        finding = only(doctor.check_shared_memory(tmp_path))
    assert (finding.state, finding.remedy) == ("problem", f"rm {tmp_path / 'stale'}")
    (tmp_path / "stale").unlink()
    (tmp_path / "open").unlink()
    assert only(doctor.check_shared_memory(tmp_path)).state == "ok"
    monkeypatch.setattr(doctor, "MIN_SHM", math.inf)
    assert "--shm-size" in only(doctor.check_shared_memory(tmp_path)).remedy
    assert only(doctor.check_shared_memory(tmp_path / "absent")).state == "note"


def test_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(doctor.INTERFACE, "eth99")
    assert f"{doctor.INTERFACE}=eth99" in only(doctor.check_network()).text
    monkeypatch.delenv(doctor.INTERFACE)
    assert only(doctor.check_network()).state == "ok"
    monkeypatch.setattr(doctor.socket, "getaddrinfo", Mock(side_effect=OSError("Name or service not known")))
    assert "/etc/hosts" in only(doctor.check_network()).remedy


def test_a_stage_that_stops_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(asdict(Finding("torch", "loads")))

    def stages(script: str, timeout_s: float = 300) -> list[Finding]:
        return doctor.check_stages([sys.executable, "-c", script], timeout_s)

    assert only(stages("import time; time.sleep(600)", 0.5)).text == "failed: not done after 0.5 s"
    failed = stages(f"print('{line}', flush=True)\nraise ImportError('no libdgl.so')")
    crashed = stages(f"print('{line}', flush=True)\nimport os; os.kill(os.getpid(), 11)")
    late = subprocess.TimeoutExpired([], 5, line.encode())
    monkeypatch.setattr(doctor.subprocess, "run", Mock(side_effect=late))
    reasons = {"ImportError: no libdgl.so": failed, "ended by signal 11": crashed, "not done after 5 s": stages("", 5)}
    for reason, findings in reasons.items():
        assert [(one.check, one.state) for one in findings] == [("torch", "ok"), ("dgl", "problem")]
        assert findings[1].text == f"failed: {reason}"
        assert "dgl==1.1.3" in findings[1].remedy


def test_native_kernels_or_why_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = tmp_path / "not_compiled.txt"
    monkeypatch.setattr(library, "load", Mock(return_value=Mock(level="avx2", bfloat16=False)))
    assert doctor.try_native() == "kernels for avx2 (model.engine=auto uses them)"
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError):
        build_native.build(tmp_path)
    monkeypatch.setattr(library, "REASON", reason)
    monkeypatch.setattr(library, "LEVELS", ("none",))
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    assert doctor.try_native() == "none (not compiled: false failed: exit code 1); models run on the torch engine"
    reason.unlink()
    assert "pip install -e ." in doctor.try_native()


def test_a_stage_that_computes_wrong_results_is_a_problem(monkeypatch, capsys, tmp_path):
    assert "none" in doctor.try_gpu(tmp_path)
    (tmp_path / "nvidia0").touch()
    with pytest.raises(Failure, match="torch cannot use it"):
        doctor.try_gpu(tmp_path)
    ones = torch.ones
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_name", "H200")):
        monkeypatch.setattr(torch.cuda, name, Mock(return_value=value))
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n))
    monkeypatch.setattr(message_passing, "dgl_supports", lambda device: False)
    assert "torch engine" in doctor.try_gpu(tmp_path)
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n - 1))
    monkeypatch.setattr(spawn, "run_ranks", lambda *_, **__: [1.0, 2.0])
    monkeypatch.setattr(dgl.DGLGraph, "update_all", lambda graph, *_: graph.ndata.update(y=torch.zeros(2)))
    doctor.run_stages()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["state"] for one in lines] == ["ok", "problem", "ok", "problem", "problem"]
    assert [one["check"] for one in lines] == list(doctor.STAGES)
