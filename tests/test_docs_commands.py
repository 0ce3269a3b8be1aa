"""The commands of README.md and docs/ run as they stand, in the order of their page, and print what the page shows.

Blocks marked `sh` run, except those that begin with `# not run: REASON`: what they take, need or depend on. All are
parsed in test_docs_parse.py. A block with a file name is saved as it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import STDOUT

import hosts
import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*) ?([\w.]*)\n(.*?)^```$", re.M | re.S)
SKIPPED = re.compile(r"# not run: (takes|needs|depends on) \w+")
SHELL = re.compile(r"^ {4}(?:distegnn|python|make|pytest) ", re.M)
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
RECIPES = sorted(ROOT.glob("recipes/*/README.md"))
# pages that use the files of another
BEFORE = {ROOT / "docs" / name: ROOT / "docs" / "quickstart.md" for name in ("halo.md", "inference.md")}
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?%?")
COMPARED = re.compile(
    r"\d\.\d{3,}e[+-]\d+|\d+\.\d+%|\d+,\d{3}(?:,\d{3})*"
)  # errors, shares and counts; others are times


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Language, file name and content of each fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def runs(language: str, content: str) -> bool:
    """Whether it is a block of commands that runs here; some need emulated hosts, and so root, and DGL 1's servers."""
    old_dgl = importlib.metadata.version("dgl").startswith("1.")
    impossible = content.startswith(("# needs root", "# needs two machines")) and (hosts.missing() or not old_dgl)
    return language == "sh" and not SKIPPED.match(content) and not impossible


def skeleton(line: str) -> str:
    """A line without its numbers, rules and spacing."""
    return re.sub(r"-{2,}|\s+|#", "", NUMBER.sub("#", line))


def differences(shown: str, printed: str) -> list[str]:
    """The lines of a page that the program did not print, or printed with other numbers (2%: other processors)."""
    wrong = []
    for line in shown.splitlines():
        if not skeleton(line) or line.strip() in ("[…]", "…") or " left " in line or "worst" in line:
            continue
        alike = [other for other in printed.splitlines() if skeleton(other) == skeleton(line)]
        expected = [float(x.strip("%").replace(",", "")) for x in COMPARED.findall(line)]
        found = [[float(x.strip("%").replace(",", "")) for x in COMPARED.findall(other)] for other in alike]
        if not any(values == pytest.approx(expected, rel=0.02) for values in found):
            wrong.append(line)
    return wrong


def link_folders(folder: Path) -> None:
    """The parts of a checkout that the pages' commands read."""
    for name in ("recipes", "tools"):
        (folder / name).symlink_to(ROOT / name)


def test_every_command_is_marked():
    """A block of commands without mark, or indented, would not run."""
    for page in PAGES:
        plain = [content for language, _, content in blocks(page) if not language]
        assert [text for text in plain if re.match(r"(distegnn|python|make) ", text)] == [], page
        assert SHELL.findall(FENCE.sub("", page.read_text(encoding="utf-8"))) == [], page


def test_differences_are_found():
    shown = (
        "a/b: 96 snapshots, 2.6 s\n  method  edges cut\n  ------  ---\n  metis        4.2%   0.02\n  x  1.5168e-02  3.1"
    )
    printed = "noise\na/b: 96 snapshots, 9.9 s\n method edges cut\n metis 4.2% 0.1\n x 1.5170e-02 4"
    assert differences(shown, printed) == []
    assert differences(shown, printed.replace("4.2%", "4.9%")) == ["  metis        4.2%   0.02"]
    assert differences(shown, printed.replace("5170e-02", "6170e-02")) == ["  x  1.5168e-02  3.1"]
    assert differences(shown, printed.replace("metis", "other")) == ["  metis        4.2%   0.02"]


RUN = [page for page in [*PAGES, *RECIPES] if any(runs(language, content) for language, _, content in blocks(page))]


def run_block(content: str, folder: Path, programs: Path) -> str:
    """What a block prints in bash. What it leaves in the background ends with it."""
    path = os.pathsep.join([str(folder / "bin"), str(programs), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        command = ["bash", "-e", "-o", "pipefail", "-c", content]
        ran = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=STDOUT, start_new_session=True)
        try:
            code = ran.wait(500)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ran.pid, signal.SIGKILL)
            ran.wait()
        output.seek(0)
        printed = output.read()
    assert code == 0, f"{content}\n{printed}"
    return printed


@contextlib.contextmanager
def two_machines(page: Path, folder: Path) -> Iterator[None]:
    """The emulated hosts node1 and node2, and a program `ssh` that reaches them, for a page that needs two machines."""
    (folder / "bin").mkdir()
    if not any(content.startswith("# needs two machines") for _, _, content in blocks(page)) or hosts.missing():
        yield
        return
    with hosts.Hosts(["node1", "node2"], interface="ib0") as up:
        (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shlex.join(up.ssh)} "$@"\n')
        (folder / "bin" / "ssh").chmod(0o755)
        yield


@pytest.mark.parametrize("page", [p for p in RUN if p not in BEFORE], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_as_typed(page: Path, tmp_path: Path, distegnn: Path) -> None:
    link_folders(tmp_path)
    printed = None
    pages = [page, *(p for p in RUN if BEFORE.get(p) == page)]
    with two_machines(page, tmp_path):
        for language, name, content in [block for p in pages for block in blocks(p)]:
            if name:
                (tmp_path / name).write_text(content, encoding="utf-8")
            if runs(language, content):
                printed = run_block(content, tmp_path, distegnn.parent)
            elif printed is not None:
                if not language:
                    assert differences(content, printed) == [], printed
                printed = None
