"""The hosts of a launch: from a file, from Slurm's environment, or this machine alone; and how to run a command there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import Failure

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15"  # keys only: nobody is there to type a password
SRUN = "srun --overlap --nodes=1 --ntasks=1 --unbuffered"


@dataclass(frozen=True)
class Host:
    """A machine of a launch.

    name: as ssh or Slurm knows it; reach: the words that, with a shell command behind them, run it there; copy: what rsync
    shall use to get there, None where it can't; trainers: None: as many as the store has for each machine.
    """

    name: str
    reach: tuple[str, ...]
    copy: str | None = None
    trainers: int | None = None
    interface: str | None = None
    python: str = sys.executable

    def command(self, *words: str) -> list[str]:
        """The argument list that runs these words there, in this folder, with what decides which code Python finds."""
        kept = {key: os.environ[key] for key in ("PYTHONPATH", "OMP_NUM_THREADS") if key in os.environ}
        settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in kept.items())
        return [*self.reach, f"cd {shlex.quote(os.getcwd())} && exec env {settings} {shlex.join(words)}"]


def listed(file: Path | None, local: bool, ssh: str | None) -> list[Host]:
    """The hosts that the options name, or those of the Slurm job that this is in."""
    if local:
        return this_machine()
    return from_file(file, ssh or SSH) if file else from_slurm()


def this_machine() -> list[Host]:
    """One host: this one, over its loopback."""
    return [Host("localhost", ("sh", "-c"), interface="lo")]


def from_file(path: Path, ssh: str = SSH) -> list[Host]:
    """Hosts from a file: one a line, `[user@]host [port=22] [trainers=2] [interface=eth0] [python=/path]`, # for comments.

    ssh: the program, with its options, that runs a command on a host: PROGRAM [-p PORT] HOST COMMAND.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(
            f"{path}: no readable file of hosts; write one host a line, for example `node1 trainers=2`"
        ) from error
    found: list[Host] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if words:
            found.append(_host(words, f"{path}, line {number}", ssh))
    if not found:
        raise Failure(f"{path}: names no host; write one a line, for example `node1 trainers=2`")
    for name in {host.name for host in found}:
        if sum(host.name == name for host in found) > 1:
            raise Failure(
                f"{path}: names {name} twice; a machine takes one line, with trainers=N for several processes"
            )
    return found


def _host(words: list[str], where: str, ssh: str) -> Host:
    name, *settings = words
    given: dict[str, str] = {}
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals or not value or key not in ("port", "trainers", "interface", "python"):
            raise Failure(f"{where}: '{word}'; use port=N, trainers=N, interface=NAME or python=PATH")
        given[key] = value
    for key in ("port", "trainers"):
        if key in given and not (given[key].isdecimal() and 0 < int(given[key]) < 65536):
            raise Failure(f"{where}: {key}={given[key]}: must be a whole number above 0")
    if name.startswith("-"):
        raise Failure(f"{where}: '{name}' is no name of a host")
    copy = [*shlex.split(ssh), *(["-p", given["port"]] if "port" in given else [])]
    return Host(
        name,
        (*copy, name),
        shlex.join(copy),
        int(given["trainers"]) if "trainers" in given else None,
        given.get("interface"),
        given.get("python", sys.executable),
    )


def from_slurm(environ: Mapping[str, str] = os.environ) -> list[Host]:
    """The nodes of the Slurm job that this process is in, each reached by a step of one task (srun)."""
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise Failure("no hosts: name them with --hosts FILE, use --local, or start this inside a Slurm job")
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise Failure(
            f"SLURM_JOB_NODELIST={nodes}: scontrol does not expand it ({error}); name hosts with --hosts"
        ) from error
    return [Host(name, (*shlex.split(SRUN), f"--nodelist={name}", "sh", "-c")) for name in listed]
