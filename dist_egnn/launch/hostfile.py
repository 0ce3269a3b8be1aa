"""The hosts of a launch, from a file, from Slurm, or this machine alone; and how to run a command on them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Failure

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15"  # BatchMode: keys only, no password
SRUN = "srun --overlap --nodes=1 --ntasks=1 --unbuffered"
SETTINGS = ("port", "trainers", "interface", "python")


@dataclass(frozen=True)
class Host:
    """A machine of a launch."""

    name: str  # as ssh or Slurm knows it
    reach: tuple[str, ...]  # the command that runs a shell command there
    copy: str | None = None  # remote shell for rsync, if there is one
    trainers: int | None = None  # None: as many as the store has for each machine
    interface: str | None = None
    python: str = sys.executable

    def command(self, *words: str) -> list[str]:
        """The argument list that runs these words there, in this working folder, with this PYTHONPATH."""
        variables = [f"{k}={shlex.quote(os.environ[k])}" for k in ("PYTHONPATH", "OMP_NUM_THREADS") if k in os.environ]
        return [*self.reach, f"cd {shlex.quote(os.getcwd())} && exec env {' '.join(variables)} {shlex.join(words)}"]

    def module(self, name: str, *words: str) -> list[str]:
        """The argument list that runs a module of dist_egnn with the host's Python."""
        return [self.python, "-P", "-m", f"dist_egnn.{name}", *words]


LOCALHOST = Host("localhost", ("sh", "-c"), interface="lo")


def select_hosts(file: Path | None, local: bool, ssh: str | None) -> list[Host]:
    if local:
        return [LOCALHOST]
    return read_hosts(file, ssh or SSH) if file else slurm_hosts()


def read_hosts(path: Path, ssh: str = SSH) -> list[Host]:
    """Read a file, a host per line: `[user@]host [port=22] [trainers=2] [interface=eth0] [python=/path]  # comment`.

    ssh: the program, with its options, that runs a command on a host: PROGRAM [-p PORT] HOST COMMAND.
    """
    remedy = "write one host per line, for example `node1 trainers=2`"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path}: not a readable file of hosts; {remedy}") from error
    rows = {f"{path}, line {number}": line.partition("#")[0] for number, line in enumerate(lines, 1)}
    split = {where: _words(line, where) for where, line in rows.items()}
    shell = [ssh] if shutil.which(ssh) else _words(ssh, "--ssh")  # a path may contain spaces
    hosts = [_parse_host(*words, where=where, shell=shell) for where, words in split.items() if words]
    if not hosts:
        raise Failure(f"{path}: names no host; {remedy}")
    name, count = Counter(host.name for host in hosts).most_common(1)[0]
    if count > 1:
        raise Failure(f"{path}: names {name} twice; use one line per machine, with trainers=N for several processes")
    return hosts


def _words(text: str, where: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise Failure(f"{where}: {text}: {error}; close the quotation, or put a word with spaces into '…'") from error


def _parse_host(name: str, *settings: str, where: str, shell: list[str]) -> Host:
    if name.startswith("-"):
        raise Failure(f"{where}: '{name}' is not a host name")
    fields: dict[str, Any] = {}
    for word in settings:
        key, _, value = word.partition("=")
        if not value or key not in SETTINGS:
            raise Failure(f"{where}: '{word}'; use port=N, trainers=N, interface=NAME or python=PATH")
        if key in ("port", "trainers") and not (value.isdecimal() and 0 < int(value) < 65536):
            raise Failure(f"{where}: {word}: must be a whole number above 0")
        fields[key] = int(value) if key == "trainers" else value
    remote_shell = shell + (["-p", fields.pop("port")] if "port" in fields else [])
    return Host(name, (*remote_shell, name), shlex.join(remote_shell), **fields)


def slurm_hosts() -> list[Host]:
    """The nodes of the Slurm job that this process is in; srun runs commands there."""
    if not (nodes := os.environ.get("SLURM_JOB_NODELIST")):
        raise Failure("no hosts: name them with --hosts FILE, use --local, or start this inside a Slurm job")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        names = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=60
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        problem = f"SLURM_JOB_NODELIST={nodes}: scontrol does not expand it ({error})"
        raise Failure(f"{problem}; name the hosts with --hosts") from error
    return [Host(name, (*shlex.split(SRUN), f"--nodelist={name}", "sh", "-c")) for name in names]
