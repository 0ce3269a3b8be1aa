"""`distegnn doctor`: whether this machine and this installation can train, and what to do where they cannot.

Each check returns findings. What may hang or crash, loading torch and DGL and a group of two processes, happens in a process of
its own, which has ``PATIENCE_S`` seconds and says how far it came.
"""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import json
import math
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..utils import resources
from ..utils.memory import available_memory, cgroup_limit

INTERFACE = "GLOO_SOCKET_IFNAME"  # what comm.py sets to lo unless it is set
PATIENCE_S = 90.0  # on an idle machine the probe takes some four seconds
LEAST_SHM, LEAST_DISK, LEAST_MEMORY = 256e6, 2e9, 1e9  # bytes
EXTRAS = {
    "nbody": "recipes/nbody: simulating its data",
    "fluid": "recipes/fluid113k: simulating its data, or reading the published records",
    "protein": "recipes/protein: reading trajectories of molecular dynamics",
    "water3d": "recipes/water3d: reading TFRecord files",
    "tfn": "TFN and FastTFN: spherical harmonics and tensor products",
    "metis": "partitions by METIS whose parts follow weights",
    "viz": "pictures: report, render, plot.png of a sweep, the demo",
    "pyvista": "a rollout's file drawn by VTK",
    "dev": "make test, make lint",
}


@dataclass(frozen=True)
class Finding:
    """What a check found. state: ok, note (nothing to mend) or problem; remedy: one line; every problem has one."""

    check: str
    state: str
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def note(check: str, text: str) -> Finding:
    return Finding(check, "note", text)


def problem(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, "problem", text, remedy)


# versions


def versions(name: str = "dist_egnn") -> list[Finding]:
    """Installed packages against the ranges that this package's metadata names, and each extra's."""
    from packaging.requirements import Requirement

    try:
        told = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        remedy = "install it: make setup, or pip install -e . in the checkout"
        return [problem("versions", f"{name} is not installed: there is nothing to say which versions fit", remedy)]
    needed = [Requirement(text) for text in told.requires or []]
    found = [_python(told.metadata["Requires-Python"] or "")]
    base = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [(r, w) for r in base if (w := _misfit(r))]
    found += [problem("versions", text, f"pip install '{r.name}{r.specifier}'") for r, text in wrong]
    if not wrong:
        shown = ", ".join(f"{r.name} {metadata.version(r.name)}" for r in base[:5])
        found.append(ok("versions", f"{len(base)} packages fit: {shown}, …"))
    for extra in told.metadata.get_all("Provides-Extra") or []:
        own = [r for r in needed if r.marker is not None and not r.marker.evaluate({"extra": ""})]
        found.append(_extra(extra, [r for r in own if r.marker.evaluate({"extra": extra})]))  # type: ignore[union-attr]
    return found


def _python(allowed: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    if SpecifierSet(allowed).contains(version, prereleases=True):
        return ok("python", f"{version} ({sys.executable})")
    return problem("python", f"{version} is not {allowed}", "make PYTHON=python3.11 setup")


def _misfit(requirement: Any) -> str:
    """What is wrong with the installed package; '' if nothing."""
    try:
        there = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed, {requirement.specifier or 'any version'} is needed"
    if requirement.specifier.contains(there, prereleases=True):
        return ""
    return f"{requirement.name} {there} is installed, {requirement.specifier} is needed"


def _extra(extra: str, needed: list[Any]) -> Finding:
    """An extra is all there, or not; a version that does not fit is a problem."""
    use = EXTRAS.get(extra, "")
    wrong = {r: text for r in needed if (text := _misfit(r))}
    missing = [r for r, text in wrong.items() if "is not installed" in text]
    for r in wrong:
        if r not in missing:
            return problem(f"extra {extra}", wrong[r], f"pip install '{r.name}{r.specifier}'")
    if missing:
        names = ", ".join(r.name for r in missing)
        return Finding(f"extra {extra}", "note", f"without {names} ({use})", f"to add it: pip install -e '.[{extra}]'")
    return ok(f"extra {extra}", f"there ({use})")


# the machine


def threads(environ: Any = os.environ, cores: float | None = None) -> list[Finding]:
    """Threads of a process against the cores there are."""
    cores = resources.available_cores() if cores is None else cores
    quota = resources.cpu_quota()
    of = f"{os.cpu_count()} cores, {cores:g} for us" + ("" if math.isinf(quota) else " (control group's limit)")
    given = environ.get("OMP_NUM_THREADS", "")
    if given and not re.fullmatch(r"[1-9]\d*", given):
        text = f"OMP_NUM_THREADS={given} is no number of threads"
        return [problem("threads", text, "export OMP_NUM_THREADS=1")]
    if given and int(given) > max(cores, 1):
        text = f"OMP_NUM_THREADS={given}, more than the {cores:g} cores: DGL and torch lose most of their speed"
        return [problem("threads", text, "export OMP_NUM_THREADS=1")]
    return [ok("threads", f"{given or 'as many as cores'} a process; {of}")]


def memory(free: float | None = None) -> list[Finding]:
    """What new processes can take."""
    free = available_memory() if free is None else free
    limit = cgroup_limit()
    of = "" if math.isinf(limit) else f", the control group may hold {limit / 1e9:.1f} GB"
    if free < LEAST_MEMORY:
        text = f"{free / 1e9:.1f} GB are free{of}; a process takes 0.3 GB before it computes"
        return [problem("memory", text, "end other programs, or raise the container's limit")]
    return [ok("memory", f"{free / 1e9:.1f} GB are free{of}")]


def disk(folders: Iterable[Path] | None = None) -> list[Finding]:
    """Free space where runs and stores go, and where temporary files do."""
    found = []
    for folder in dict.fromkeys(folders or (Path.cwd(), Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        text = f"{free / 1e9:.1f} GB are free at {folder}"
        if not os.access(folder, os.W_OK):
            found.append(problem("disk", f"{folder} cannot be written", "work in a folder of yours, or set TMPDIR"))
        elif free < LEAST_DISK:
            found.append(problem("disk", text, "remove what is not needed, or work elsewhere (run.dir, --out, TMPDIR)"))
        else:
            found.append(ok("disk", text))
    return found


def shared_memory(folder: Path = Path("/dev/shm"), processes: Path = Path("/proc"), age_s: float = 60) -> list[Finding]:
    """Room in /dev/shm, where DGL's servers put graphs, and files of ours there that no process has open any more."""
    if not folder.is_dir():
        return [note("shared memory", f"no {folder}: DGL's graph servers cannot share graphs; training needs none")]
    usage = shutil.disk_usage(folder)
    found = []
    text = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB are free in {folder}"
    if usage.free < LEAST_SHM:
        remedy = f"remove stale files there, or start the container with --shm-size=2g ({folder})"
        found.append(problem("shared memory", text, remedy))
    stale = _stale(folder, processes, age_s)
    if stale:
        size = sum(file.stat().st_size for file in stale)
        names = " ".join(str(file) for file in stale[:5]) + (" …" if len(stale) > 5 else "")
        text = f"{len(stale)} files that no process of ours has open, {size / 1e6:.1f} MB in {folder}"
        found.append(problem("shared memory", text, f"rm {names}"))
    return found or [ok("shared memory", text)]


def _stale(folder: Path, processes: Path, age_s: float) -> list[Path]:
    """Our files that are older than ``age_s`` and neither mapped nor open in any of our processes."""
    mine = [f for f in folder.iterdir() if f.is_file() and not f.is_symlink() and f.stat().st_uid == os.getuid()]
    mine = [f for f in mine if time.time() - f.stat().st_mtime > age_s]
    used: set[str] = set()
    for process in processes.glob("[0-9]*") if mine else ():
        with contextlib.suppress(OSError):  # ended, or not ours
            lines = (process / "maps").read_text().splitlines()
            used |= {line.split(maxsplit=5)[5] for line in lines if str(folder) in line}
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(OSError):  # closed since
                    used.add(os.readlink(fd))
    return sorted(f for f in mine if str(f) not in used)


def network(environ: Any = os.environ) -> list[Finding]:
    """Whether the loopback resolves and the group's interface is there."""
    found = []
    name = environ.get(INTERFACE, "lo")
    there = [n for _, n in socket.if_nameindex()]
    if name not in there:
        text = f"{INTERFACE}={name}: no such network interface (there are: {', '.join(there)})"
        found.append(problem("network", text, f"unset {INTERFACE}, or name one of these"))
    try:
        address = socket.getaddrinfo("localhost", 0, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        with socket.create_server((str(address[0]), 0)) as server, socket.create_connection(server.getsockname(), 5):
            pass
    except OSError as error:
        text = f"localhost: {error}: processes of a machine could not meet"
        found.append(problem("network", text, "put '127.0.0.1 localhost' into /etc/hosts, and: ip link set lo up"))
    return found or [ok("network", f"localhost is {address[0]}, processes meet on {name}")]


# what takes a process of its own


def probe() -> None:
    """The stages torch, dgl, gpu and group, in order: a line of JSON each as it is done. Run by `probes` alone."""

    def say(stage: str, **found: Any) -> None:
        print(json.dumps({"stage": stage, **found}), flush=True)

    import torch

    say("torch", version=torch.__version__, cuda=torch.version.cuda)
    import dgl

    graph = dgl.graph(([0, 1], [1, 0]))
    graph.ndata["x"] = torch.tensor([1.0, 2.0])
    graph.update_all(dgl.function.copy_u("x", "m"), dgl.function.sum("m", "y"))
    say("dgl", version=dgl.__version__, right=graph.ndata["y"].tolist() == [2.0, 1.0])
    from ..ops import message_passing

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names, dgl_too = [torch.cuda.get_device_name(k) for k in range(seen)], False
    if seen:
        right = float(torch.ones(8, device="cuda").sum()) == 8
        dgl_too = message_passing.runs_dgl("cuda")
        say("gpu", names=names, right=right, dgl=dgl_too)
    else:
        say("gpu", names=[], right=True, dgl=False)
    from ..distributed import spawn

    started = time.perf_counter()
    sums = spawn.run_ranks(_sum_of_two, 2, timeout_s=PATIENCE_S / 3)
    say("group", right=sums == [3.0, 3.0], seconds=time.perf_counter() - started)


def _sum_of_two(group: Any) -> float:
    import torch

    return float(group.sum(torch.tensor(group.rank + 1.0)))


def probes(command: list[str] | None = None, patience_s: float = PATIENCE_S) -> list[Finding]:
    """Run `probe` and judge what it said; the stage at which it stopped is the problem."""
    command = command or [sys.executable, "-P", "-c", "from dist_egnn.planning import doctor; doctor.probe()"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience_s, check=False)
        out, why = done.stdout, _last_line(done.stderr, done.returncode)
    except subprocess.TimeoutExpired as late:
        out = (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        why = f"not done after {patience_s:g} s"
    said = {}
    for line in out.splitlines():
        if line.startswith('{"stage"'):
            one = json.loads(line)
            said[one.pop("stage")] = one
    found = []
    for stage, (judge, remedy) in STAGES.items():
        if stage not in said:
            found.append(problem(stage, f"failed: {why}", remedy))
            break
        found.append(judge(said[stage], remedy))
    return found


def _last_line(text: str, code: int) -> str:
    if code < 0:
        return f"ended by signal {-code}"
    return (text.strip().splitlines() or [f"exit code {code}"])[-1]


def _judge_torch(said: dict[str, Any], remedy: str) -> Finding:
    return ok("torch", f"{said['version']} loads, {'CUDA ' + said['cuda'] if said['cuda'] else 'for CPUs only'}")


def _judge_dgl(said: dict[str, Any], remedy: str) -> Finding:
    if not said["right"]:
        return problem("dgl", f"{said['version']} loads, but sums messages wrongly", remedy)
    return ok("dgl", f"{said['version']} loads and passes messages")


def _judge_gpu(said: dict[str, Any], remedy: str, devices: Path = Path("/dev")) -> Finding:
    if not said["names"]:
        if list(devices.glob("nvidia[0-9]*")):
            return problem("gpu", "there is one, but torch cannot use it", remedy)
        return ok("gpu", "none; training runs on the CPU")
    names = ", ".join(said["names"])
    if not said["right"]:
        return problem("gpu", f"{names}: torch computes wrongly on it", remedy)
    return ok(
        "gpu",
        f"{names}: torch {'and DGL use' if said['dgl'] else 'uses'} it (train.device=cuda)"
        + ("" if said["dgl"] else "; this DGL has no build for it, so messages run by the torch engine"),
    )


def _judge_group(said: dict[str, Any], remedy: str) -> Finding:
    if not said["right"]:
        return problem("group", "two processes sum wrongly", remedy)
    return ok("group", f"two processes meet and sum, {said['seconds']:.1f} s")


STAGES: dict[str, tuple[Callable[[dict[str, Any], str], Finding], str]] = {
    "torch": (
        _judge_torch,
        "install torch again: make setup in a fresh checkout, or pip install --force-reinstall torch==2.13.0",
    ),
    "dgl": (
        _judge_dgl,
        "install DGL again: pip install --force-reinstall --no-deps dgl==1.1.3; only it works with this torch",
    ),
    "gpu": (
        _judge_gpu,
        "install a CUDA build of torch that fits the driver (nvidia-smi shows it), or set train.device=cpu",
    ),
    "group": (_judge_group, f"check that the interface lo is up and no firewall closes it; unset {INTERFACE}"),
}
CHECKS: tuple[Callable[[], list[Finding]], ...] = (versions, threads, memory, disk, shared_memory, network, probes)


def examine() -> list[Finding]:
    """Every check's findings, in order. A check that itself fails is a problem, not the end."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check()
        except Exception as error:  # the doctor must reach its end on a machine that is not well
            name = check.__name__.replace("_", " ")
            found.append(problem(name, f"could not be checked: {type(error).__name__}: {error}", "please report this"))
    return found


def plain(found: list[Finding]) -> list[dict[str, str]]:
    """As JSON gives it back."""
    return [asdict(one) for one in found]
