"""Provenance of a run: versions, git state, host, seeds. about.yaml has an entry for the start and for each resume."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..errors import Failure
from ..utils import filesystem


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of the checkout that tracks a folder, and whether tracked files were changed; {} without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # read only
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
        return result.stdout.strip()

    try:
        if not git("ls-files", "."):  # not tracked: an installed copy inside another checkout
            return {}
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def describe(processes: int, device: str, seeds: dict[str, int]) -> dict[str, Any]:
    """An entry of about.yaml."""
    entry = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "versions": {
            "dist_egnn": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "dgl", "numpy")},
        },
        "git": git_state(Path(__file__).parent),
        "host": {"name": platform.node(), "system": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        "processes": processes,
        "device": device,
        "seeds": seeds,
    }
    return {key: value for key, value in entry.items() if value != {}}


def append(path: Path, entry: dict[str, Any]) -> None:
    """Append an entry to about.yaml, a YAML list, and keep the existing bytes."""
    try:
        existing = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise Failure(f"{path}: cannot be read ({error.strerror})") from error
    filesystem.write_atomically(path, existing + yaml.safe_dump([entry], sort_keys=False, width=1000).encode())
