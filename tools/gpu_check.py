"""Test and measure on a machine with a CUDA device, within ten minutes on one H200:

    python tools/gpu_check.py [--out FILE.md] [--minutes 10]

The tests of devices and engines, a step against its peers, steps of 1,000,000 and 10,000,000 nodes with their memory, and
one and two processes on the devices. Prints tables in Markdown for docs/performance.md. Exit code 1 if a part failed or
had no time left, 2 without CUDA.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_egnn.errors import Failure
from dist_egnn.utils import devices
from dist_egnn.utils.filesystem import write_atomically

ROOT = Path(__file__).parents[1]
BENCH = [sys.executable, str(ROOT / "tools/bench")]
TESTS = [sys.executable, "-m", "pytest", "-q", "tests/train/test_pretend_device.py", "tests/utils/test_devices.py"]
TESTS += ["tests/ops", "tests/models/test_models.py", "-k", "pretend_device or cuda or device or engine or tiles"]
# the order is that of their worth, if time runs out
COMMANDS = {
    "tests": TESTS,
    "step": [*BENCH, "step", "--device", "cuda", "--nodes", "113140", "--peers", "--json"],
    "1 process": [*BENCH, "pipeline", "--device", "cuda", "--nodes", "113140", "--parts", "1", "--json"],
    "2 processes": [*BENCH, "pipeline", "--device", "cuda", "--nodes", "113140", "--parts", "2", "--json"],
    "1,000,000 nodes": [*BENCH, "step", "--device", "cuda", "--nodes", "1000000", "--json"],
    "10,000,000 nodes": [*BENCH, "step", "--device", "cuda", "--nodes", "10000000", "--repeats", "1", "--json"],
}


@dataclass
class Outcome:
    """How a command ended: ``problem`` is empty if it succeeded, ``last`` is its last line."""

    seconds: float
    problem: str
    last: str


def run(command: Sequence[str], seconds: float) -> Outcome:
    """Run a command of the repository for so many seconds at most; its progress goes to standard error."""
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", errors="replace") as process:
        try:
            output, _ = process.communicate(timeout=max(seconds, 0))
            problem = f"exit code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.terminate()  # its own processes end with it
            output, problem = "", "no time left"
    return Outcome(time.monotonic() - started, problem, (output.strip().splitlines() or [""])[-1])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _numbers(row: Mapping[str, Any], *keys: str) -> list[str]:
    return [f"{row[key]:.4g}" for key in keys]


def report(machine: str, outcomes: Mapping[str, Outcome]) -> str:
    """The tables of the parts that succeeded and a row for each part."""
    numbers: dict[str, dict[str, Any]] = {
        name: json.loads(one.last) for name, one in outcomes.items() if not one.problem and name != "tests"
    }
    lines = [machine, ""]
    if step := numbers.get("step"):
        variants = {"ours": step, **step["peers"]}
        rows = []
        for name, row in variants.items():
            ratio, difference = f"{row['step_s'] / step['step_s']:.2f}", row.get("difference")
            rows.append([name, *_numbers(row, "forward_s", "step_s", "peak_gb"), ratio])
            rows[-1].append("–" if difference is None else f"{difference:.0e}")
        if "EGNNConv" not in variants:
            rows.append(["EGNNConv", "DGL has no build for CUDA", *["–"] * 4])
        header = [f"{step['nodes']:,} nodes", "forward [s]", "step [s]", "peak [GB]", "step/ours", "difference"]
        lines += _markdown(header, rows)
    rows = [
        [f"{one['nodes']:,}", f"{one['edges']:,}", *_numbers(one, "forward_s", "step_s", "peak_gb")]
        for name, one in numbers.items()
        if name.endswith("nodes")
    ]
    lines += _markdown(["nodes", "edges", "forward [s]", "step [s]", "peak [GB]"], rows) if rows else []
    rows = [
        [str(one["parts"]), one["backend"] or "–", *_numbers(one, "fixed_s", "fresh_s", "peak_gb")]
        for name, one in numbers.items()
        if "process" in name
    ]
    header = ["processes", "sums by", "step [s]", "step with a new snapshot [s]", "peak of a process [GB]"]
    lines += _markdown(header, rows) if rows else []
    rows = []
    for name, one in outcomes.items():
        outcome = [one.problem, one.last if name == "tests" else "" if one.problem else "done"]
        rows.append([name, ", ".join(filter(None, outcome)), f"{one.seconds:.0f}"])
    return "\n".join([*lines, *_markdown(["part", "outcome", "seconds"], rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--minutes", type=float, default=10.0, help="when parts that have not ended are stopped")
    options = parser.parse_args()
    try:
        devices.check_available("cuda", "--device ")
        if options.out and not options.out.parent.is_dir():
            raise Failure(f"--out {options.out}: no such folder; create it")
    except Failure as failure:
        print(f"error: {failure}".replace("use --device cpu", "run this on a machine with a GPU"), file=sys.stderr)
        return 2
    import torch

    names = ", ".join(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))
    end, outcomes = time.monotonic() + 60 * options.minutes, {}
    for name, command in COMMANDS.items():
        print(f"{name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
        outcomes[name] = run(command, end - time.monotonic())
    text = report(f"{names}, torch {torch.__version__}, CUDA {torch.version.cuda}.", outcomes)
    print(text)
    if options.out:
        write_atomically(options.out, text.encode())
    return int(any(one.problem for one in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
