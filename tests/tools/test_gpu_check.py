"""`tools/gpu_check.py`: its tables, its time limit, and the refusal without CUDA."""

from __future__ import annotations

import json
import sys

import gpu_check
import torch
from gpu_check import Outcome

ROW = {"forward_s": 0.0123456, "step_s": 0.05, "peak_gb": 1.5}
STEP = {**ROW, "nodes": 113140, "edges": 1651844, "peers": {"plain": {**ROW, "step_s": 0.2, "difference": 2e-6}}}
OUTCOMES = {
    "tests": Outcome(40.2, "exit code 1", "1 failed, 12 passed in 39 s"),
    "step": Outcome(60.0, "", json.dumps(STEP)),
}
OUTCOMES["2 processes"] = Outcome(
    30.0, "", json.dumps({"parts": 2, "backend": "gloo", "fixed_s": 0.1, "fresh_s": 0.11, "peak_gb": 0.7})
)
OUTCOMES["1,000,000 nodes"] = Outcome(30.0, "", json.dumps({**ROW, "nodes": 10**6, "edges": 15 * 10**6}))
OUTCOMES["10,000,000 nodes"] = Outcome(9.0, "no time left", "")


def test_the_tables_show_every_part() -> None:
    lines = gpu_check.report("One GPU.", OUTCOMES).splitlines()
    expected = ["| ours | 0.01235 | 0.05 | 1.5 | 1.00 | – |", "| plain | 0.01235 | 0.2 | 1.5 | 4.00 | 2e-06 |"]
    expected += ["| EGNNConv | DGL has no build for CUDA | – | – | – | – |", "| 2 | gloo | 0.1 | 0.11 | 0.7 |"]
    expected += [
        "| 1,000,000 | 15,000,000 | 0.01235 | 0.05 | 1.5 |",
        "| tests | exit code 1, 1 failed, 12 passed in 39 s | 40 |",
    ]
    expected += ["| 10,000,000 nodes | no time left | 9 |"]
    assert [line for line in expected if line not in lines] == []
    tables = "\n".join(lines).split("\n\n")[1:]
    assert all(len({row.count("|") for row in table.strip().splitlines()}) == 1 for table in tables)


def test_a_part_ends_at_the_time_limit_or_with_an_error() -> None:
    assert gpu_check.run([sys.executable, "-c", "import time; time.sleep(600)"], 0.1).problem == "no time left"
    failed = gpu_check.run([sys.executable, "-c", "print(1); print(2); raise SystemExit(3)"], 300)
    assert (failed.problem, failed.last) == ("exit code 3", "2")


def test_without_cuda_one_line_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --device cuda: not available: torch ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", "missing/cuda.md"])
    assert gpu_check.main() == 2
    assert capsys.readouterr().err == "error: --out missing/cuda.md: no such folder; create it\n"
