"""Output on a terminal of 80 columns, through a pseudo-terminal, and output in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from small_data import DATA

from dist_egnn.utils import console, progress


def run_on_terminal(command: list[str], columns: int = 80) -> tuple[int, list[str], str]:
    """Run a command on a pseudo-terminal: exit code, lines on the screen at the end, everything that was written."""
    pyte = pytest.importorskip("pyte", reason="pip install -e '.[dev]'")
    child, terminal = pty.fork()
    if not child:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        os.execvpe(command[0], command, {**env, "TERM": "xterm-256color"})
    raw = b""
    try:
        while chunk := os.read(terminal, 65536):
            raw += chunk
    except OSError:  # the other side is closed
        pass
    finally:
        os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    screen = pyte.Screen(400, 1000)  # larger than the terminal: lines that are too long stay whole, none scrolls away
    pyte.ByteStream(screen).feed(raw)
    return code, [line.rstrip() for line in screen.display if line.strip()], raw.decode()


@pytest.fixture
def train(tmp_path: Path, make_store, distegnn: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    config = {"data": {**DATA, "path": str(make_store(2))}, "model": {"hidden": 4, "layers": 1}}
    Path("my.yaml").write_text(
        yaml.safe_dump({**config, "train": {"epochs": 2}, "run": {"dir": "run"}}), encoding="utf-8"
    )
    return [str(distegnn), "train", "my.yaml"]


def test_training_on_a_terminal(train: list[str]) -> None:
    """The bar, the note on its own line, the result; nothing of earlier states of the bar remains."""
    code, screen, raw = run_on_terminal(train)
    assert code == 0, screen
    bar, note, result = screen
    assert re.fullmatch(r"training ━+ 12/12 \d:\d\d:\d\d 0:00:00 left", bar)
    assert re.fullmatch(r"  MSE \d\.\de-\d\d  \S+ s/step  epoch 2/2  valid \d\.\de-\d\d", note)
    assert result.startswith("run: best validation MSE ")
    assert all(len(line) <= 80 for line in screen)
    assert "\x1b[?25h" in raw  # the cursor is visible again


def test_training_in_a_pipe(train: list[str]) -> None:
    ran = subprocess.run(train, capture_output=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", ran.stdout + ran.stderr)  # no escape sequence, no \r
    assert ran.stdout.decode().count("\n") == 1
    for line in ran.stderr.decode().splitlines():  # none if the run takes less than five seconds
        assert re.match(r"training: \d+/12, \d+ s left  loss ", line)


def test_lines_are_wrapped_on_a_terminal_only() -> None:
    text = " ".join(["a-sentence-of", "many-words"] * 8)
    command = [sys.executable, "-c", f"from dist_egnn.utils.console import print_line; print_line({text!r}, 4)"]
    _, screen, _ = run_on_terminal(command)
    assert len(screen) > 1
    assert all(len(line) <= 80 and line.startswith("    " * (k > 0)) for k, line in enumerate(screen))
    assert " ".join(line.strip() for line in screen) == text
    assert subprocess.check_output(command, text=True) == text + "\n"


def test_a_table_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is split after columns that fit; each piece repeats the label."""
    header, rows = ["name", "parts", "test MSE", "seconds"], [["FastEGNN", 2, "5.0e-3", 14]]

    def table(width: int | None, title: str = "", labels: int = 1) -> list[str]:
        monkeypatch.setattr(console, "terminal_width", lambda: width)
        console.print_table(title, header, rows, labels)
        return capsys.readouterr().out.splitlines()

    narrow = table(20, "a title that is longer than that")
    assert narrow[:5] == [
        "a title that is",
        "  longer than that",
        "  name      parts",
        "  --------  -----",
        "  FastEGNN      2",
    ]
    assert [line.split() for line in narrow[6::4]] == [["name", "test", "MSE"], ["name", "seconds"]]
    assert [line.split() for line in narrow[8::4]] == [["FastEGNN", "5.0e-3"], ["FastEGNN", "14"]]
    assert table(27, labels=2)[::4] == ["  name      parts  test MSE", "  name      parts  seconds"]
    wide = "  name      parts  test MSE  seconds"
    assert table(len(wide))[0] == table(None)[0] == wide


def test_progress_lines_of_long_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every five seconds at first, then after every twentieth of the elapsed time."""
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    with progress.progress_bar("work", 2000) as update:
        for _ in range(2000):
            now += 1
            update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["work: 5/2000, 1995 s left", "work: 10/2000, 1990 s left"]
    assert lines[-1].startswith("work: 2000/2000, 0 s left")
    assert 60 < len(lines) < 90
