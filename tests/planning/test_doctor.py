"""`distegnn doctor`: it sees what is wrong, says how to mend it, and ends in bounded time whatever hangs or crashes."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dist_egnn import cli
from dist_egnn.planning import doctor
from dist_egnn.planning.doctor import Finding
from dist_egnn.utils import memory, resources

ROOT = Path(__file__).parents[2]


def only(found: list[Finding]) -> Finding:
    (one,) = found
    assert bool(one.remedy) == (one.state == "problem")
    assert "\n" not in one.text + one.remedy
    return one


def test_as_users_run_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_egnn.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    states = {one["check"]: one["state"] for one in found}
    needed = {"python", "versions", "threads", "memory", "disk", "shared memory", "network", *doctor.STAGES}
    assert needed <= set(states)
    assert {states[name] for name in ("python", "versions", "network", "torch", "dgl", "group")} == {"ok"}
    assert done.returncode == ("problem" in states.values()), done.stdout  # the machine may have one
    assert list(tmp_path.iterdir()) == []


def test_problems_have_their_remedy_and_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", (lambda: [doctor.ok("a", "fine")], broken))
    ran = CliRunner().invoke(cli.app, ["doctor"])
    assert ran.exit_code == 1
    assert "ok      a: fine\nPROBLEM broken: could not be checked: OSError: no such thing\n        → " in ran.output
    assert ran.output.endswith("1 problem\n")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [doctor.ok("a", "fine"), doctor.note("b", "so")],))
    ran = CliRunner().invoke(cli.app, ["doctor"])
    assert (ran.exit_code, ran.output) == (0, "ok      a: fine\nnote    b: so\nall well\n")


def test_versions_against_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    there = metadata.version

    def version(name: str) -> str:
        if name == "numba":
            raise metadata.PackageNotFoundError(name)
        return {"dgl": "2.1.0", "protobuf": "3.0"}.get(name, "") or there(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {(one.check, one.text): one for one in doctor.versions()}
    wrong = found["versions", "dgl 2.1.0 is installed, ==1.1.3 is needed"]
    assert (wrong.state, wrong.remedy) == ("problem", "pip install 'dgl==1.1.3'")
    assert not [one for one in found.values() if one.check == "versions" and one.state == "ok"]
    by_check = {one.check: one for one in found.values()}
    assert by_check["extra nbody"].state == "note"
    assert "without numba (recipes/nbody" in by_check["extra nbody"].text
    assert by_check["extra water3d"].state == "problem"
    assert by_check["extra water3d"].remedy == "pip install 'protobuf<8,>=4.25'"
    absent = only(doctor.versions("surely-not-installed"))
    assert "is not installed" in absent.text


def test_python_outside_the_range() -> None:
    assert doctor._python(">=3.11,<3.12").state == "ok"
    assert doctor._python("<3").remedy == "make PYTHON=python3.11 setup"


def test_every_extra_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **given: told.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    assert set(doctor.EXTRAS) == set(told["extras_require"])


@pytest.mark.parametrize(
    ("given", "cores", "state"),
    [
        ("1", 2.0, "ok"),
        ("2", 2.0, "ok"),
        ("3", 2.0, "problem"),
        ("1", 0.5, "ok"),
        ("many", 2.0, "problem"),
        ("", 2.0, "ok"),
    ],
)
def test_threads(given: str, cores: float, state: str) -> None:
    found = only(doctor.threads({"OMP_NUM_THREADS": given} if given else {}, cores))
    assert found.state == state
    assert found.remedy in ("", "export OMP_NUM_THREADS=1")


def test_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.memory(5e9)).state == "ok"
    assert only(doctor.memory(5e8)).state == "problem"
    assert only(doctor.disk([tmp_path])).check == "disk"
    monkeypatch.setattr(doctor, "LEAST_DISK", math.inf)
    assert "run.dir" in only(doctor.disk([tmp_path])).remedy
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written" in only(doctor.disk([tmp_path])).text


def test_stale_files_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stale", "open", "fresh"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    for name in ("stale", "open"):
        os.utime(tmp_path / name, (0, 0))
    with open(tmp_path / "open"):
        found = only(doctor.shared_memory(tmp_path))
    assert found.state == "problem"
    assert "1 files that no process of ours has open" in found.text
    assert found.remedy == f"rm {tmp_path / 'stale'}"
    (tmp_path / "stale").unlink()
    (tmp_path / "open").unlink()
    assert only(doctor.shared_memory(tmp_path)).state == "ok"
    monkeypatch.setattr(doctor, "LEAST_SHM", math.inf)
    assert "--shm-size" in only(doctor.shared_memory(tmp_path)).remedy
    assert only(doctor.shared_memory(tmp_path / "absent")).state == "note"


def test_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.network({})).state == "ok"
    found = only(doctor.network({doctor.INTERFACE: "eth99"}))
    assert "eth99: no such network interface (there are: " in found.text

    def lost(*_: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr(doctor.socket, "getaddrinfo", lost)
    assert "/etc/hosts" in only(doctor.network({})).remedy


TORCH = '{"stage": "torch", "version": "2", "cuda": null}'


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ("raise ImportError('no libdgl.so')", "failed: ImportError: no libdgl.so"),
        ("import os; os.kill(os.getpid(), 11)", "failed: ended by signal 11"),
        ("import time; time.sleep(60)", "failed: not done after 2 s"),
    ],
)
def test_a_probe_that_stops_names_its_stage(last: str, says: str) -> None:
    started = time.monotonic()
    found = doctor.probes([sys.executable, "-c", f"print('{TORCH}', flush=True)\n{last}"], patience_s=2)
    assert time.monotonic() - started < 30  # bounded, not measured
    assert [(one.check, one.state) for one in found] == [("torch", "ok"), ("dgl", "problem")]
    assert found[1].text == says
    assert "dgl==1.1.3" in found[1].remedy


def test_what_a_probe_says_is_judged(tmp_path: Path) -> None:
    said = {"names": [], "right": True, "dgl": False}
    assert doctor._judge_gpu(said, "mend", tmp_path).state == "ok"
    (tmp_path / "nvidia0").touch()
    assert doctor._judge_gpu(said, "mend", tmp_path).text == "there is one, but torch cannot use it"
    there = doctor._judge_gpu({"names": ["H200"], "right": True, "dgl": False}, "mend", tmp_path)
    assert (there.state, "torch engine" in there.text) == ("ok", True)
    assert doctor._judge_gpu({"names": ["H200"], "right": False, "dgl": False}, "mend", tmp_path).state == "problem"
    assert doctor._judge_dgl({"version": "1", "right": False}, "mend").state == "problem"
    assert doctor._judge_group({"right": False}, "mend").state == "problem"


def test_limits_of_a_control_group(tmp_path: Path) -> None:
    """Version 2 and version 1, and none."""
    none, two, one = (tmp_path / name for name in ("none", "two", "one"))
    for folder in (none, two, one / "cpu", one / "memory"):
        folder.mkdir(parents=True)
    assert (resources.cpu_quota(none), memory.cgroup_limit(none)) == (math.inf, math.inf)
    (two / "cpu.max").write_text("150000 100000\n")
    (two / "memory.max").write_text("1000000000\n")
    (two / "memory.stat").write_text("anon 400000000\nfile 500000000\n")
    assert (resources.cpu_quota(two), memory.cgroup_limit(two)) == (1.5, 1e9)
    assert resources.available_cores(two) <= 1.5
    assert memory.available_memory("cpu", two) <= 6e8
    (two / "cpu.max").write_text("max 100000\n")
    (two / "memory.max").write_text("max\n")
    assert (resources.cpu_quota(two), memory.cgroup_limit(two)) == (math.inf, math.inf)
    (one / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    (one / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (one / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert (resources.cpu_quota(one), memory.cgroup_limit(one)) == (0.5, math.inf)
    (one / "memory" / "memory.limit_in_bytes").write_text("2000000000\n")
    assert memory.cgroup_limit(one) == 2e9


@pytest.mark.parametrize(
    ("setting", "kept"), [("", True), ("GLIBC_TUNABLES=x.trim_threshold", False), ("MALLOC_TRIM_THRESHOLD_=0", False)]
)
def test_memory_that_is_taken_again_is_kept(setting, kept):
    """The kernel brings no new pages for what was freed, as soon as all have come once; the user's own settings stand."""
    code = (
        "import resource; from dist_egnn.utils.memory import keep_freed_memory; keep_freed_memory(); faults = []\n"
        "for _ in range(12):\n"
        "    held = [b'x' * 20_000_000 for _ in range(3)]; del held\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "print(faults[-1] - faults[1])"
    )
    name, _, value = setting.partition("=")
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | ({name: value} if name else {})
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (int(ran.stdout) < 1000) is kept
