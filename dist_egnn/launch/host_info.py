"""What an agent reports about its host: versions, code, addresses, memory, and the store. Needs no torch and no DGL."""

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
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..data.store_inputs import node_floats
from ..train import run_dir
from ..utils import memory

PACKAGES = ("torch", "dgl", "numpy", "pandas", "pyyaml", "h5py")
PACKAGE = Path(__file__).parents[1]
SIOCGIFADDR = 0x8915


def inspect_host(store: Path, run: Path) -> dict[str, Any]:
    """All that the launcher compares between hosts. store, run: folders, which have the same path on every host."""
    return {
        "versions": package_versions(),
        "code": source_hash(),
        "addresses": interface_addresses(),
        "memory": memory.available_memory(),
        "shared": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "store": summarize_store(store),
        "has_run": run_dir.can_resume(run),
    }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a training step uses; "missing" if one is not installed."""
    versions = {"python": platform.python_version(), "dist_egnn": __version__}
    for name in PACKAGES:
        versions[name] = "missing"
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def source_hash() -> str:
    """sha256 of the source of this package: two checkouts of one version may still differ."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def interface_addresses() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # no address
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def summarize_store(path: Path) -> dict[str, Any] | None:
    """What the manifest and the tables of a store say; None without a store, or if it is damaged. Reads no graphs.

    Returns, beside the inputs: sizes, bytes of each machine's partition; largest, (nodes, edges) of each rank's largest
    part; sums, (nodes, edges, halo) of each machine over all snapshots; floats, numbers per node.
    """
    try:
        content = (path / "manifest.yaml").read_bytes()
        manifest = yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        inputs, names = manifest["inputs"], list(manifest["files"])
        machines, trainers = inputs["parts"], inputs.get("trainers", 1)
        largest = [[0, 0] for _ in range(machines * trainers)]
        sums = [[0, 0, 0] for _ in range(machines)]
        with open(path / "parts.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                rank, counts = int(row["part"]), [int(row[name]) for name in ("nodes", "edges", "halo")]
                machine = rank // trainers
                largest[rank] = [max(pair) for pair in zip(largest[rank], counts, strict=False)]
                sums[machine] = [a + b for a, b in zip(sums[machine], counts, strict=True)]
        parts = [[path / name for name in names if f"/part{part}/" in name] for part in range(machines)]
        summary = {"inputs": inputs, "machines": machines, "trainers": trainers, "largest": largest, "sums": sums}
        return summary | {
            "sha256": hashlib.sha256(content).hexdigest(),
            "shards": len({name.split("/")[0] for name in names if "/" in name}),
            "sizes": [sum(file.stat().st_size for file in files if file.is_file()) for files in parts],
            "floats": node_floats(inputs),
        }
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError, yaml.YAMLError):
        return None


def port_owner(port: int) -> str:
    """ "; used by process 123 (python)" for a listening TCP port; empty if that cannot be seen."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            rows = [line.split() for line in Path(table).read_text(encoding="utf-8").splitlines()[1:]]
            sockets |= {f"socket:[{r[9]}]" for r in rows if r[3] == "0A" and int(r[1].rsplit(":", 1)[1], 16) == port}
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        with suppress(OSError):  # it has ended, or belongs to another user
            if any(os.readlink(fd) in sockets for fd in (process / "fd").iterdir()):
                return f"; used by process {process.name} ({(process / 'comm').read_text(encoding='utf-8').strip()})"
    return ""
