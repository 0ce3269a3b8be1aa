"""What an agent sees of its host: versions, code, addresses, room, and the store. The standard library and yaml alone."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..train import run_dir
from ..utils import memory, resources

PACKAGES = ("torch", "dgl", "numpy", "pandas", "omegaconf", "h5py")
PACKAGE = Path(__file__).parents[1]


def around(store: str, run: str) -> dict[str, Any]:
    """Everything that the launcher compares between hosts. store, run: folders, as they are called on every host."""
    return {
        "host": platform.node(),
        "versions": versions(),
        "code": code(),
        "addresses": addresses(),
        "cores": resources.available_cores(),
        "memory": memory.available_memory(),
        "shared": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "store": stored(Path(store)),
        "begun": run_dir.can_resume(Path(run)),
    }


def versions() -> dict[str, str]:
    """Of Python and of what a step computes with; "missing" for what is not installed."""
    found = {"python": platform.python_version(), "dist_egnn": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def code() -> str:
    """sha256 of this package's files, by name: two checkouts of one version may still differ."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def addresses() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:  # has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def stored(path: Path) -> dict[str, Any] | None:
    """What a store says of itself, without reading its graphs; None where there is none, or a damaged one."""
    try:
        content = (path / "manifest.yaml").read_bytes()
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        manifest = yaml.load(content, loader)
        inputs, names = manifest["inputs"], list(manifest["files"])
        trainers = inputs.get("trainers", 1)
        ranks = inputs["parts"] * trainers
        largest = [[0, 0] for _ in range(ranks)]
        sums = [[0, 0, 0] for _ in range(inputs["parts"])]
        with open(path / "parts.csv", newline="") as file:
            for row in csv.DictReader(file):
                rank, counts = int(row["part"]), [int(row[name]) for name in ("nodes", "edges", "halo")]
                largest[rank] = [max(pair) for pair in zip(largest[rank], counts, strict=False)]
                machine = rank // trainers
                sums[machine] = [a + b for a, b in zip(sums[machine], counts, strict=True)]
        shards = sorted({name.split("/")[0] for name in names if "/" in name})
        sizes = [
            sum((path / n).stat().st_size for n in names if f"/part{p}/" in n and (path / n).is_file())
            for p in range(inputs["parts"])
        ]
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError, yaml.YAMLError):
        return None
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "inputs": inputs,
        "machines": inputs["parts"],
        "trainers": trainers,
        "shards": len(shards),
        "sizes": sizes,
        "largest": largest,
        "sums": sums,
        "floats": 9 + len(inputs["features"]) + len(inputs["node_attributes"]),
    }


def holder_of(port: int) -> str:
    """ ", process 123 (python) has it" for a listening TCP port, as far as it may be seen."""
    wanted = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue
        wanted |= {f"socket:[{r[9]}]" for r in rows if r[3] == "0A" and int(r[1].rsplit(":", 1)[1], 16) == port}
    for process in Path("/proc").glob("[0-9]*") if wanted else ():
        try:
            if any(os.readlink(fd) in wanted for fd in (process / "fd").iterdir()):
                return f"; process {process.name} ({(process / 'comm').read_text().strip()}) has it"
        except OSError:  # ended, or not ours
            continue
    return ""
