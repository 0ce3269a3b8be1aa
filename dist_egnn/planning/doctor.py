"""`distegnn doctor`: check whether this machine and this installation can train, and name the remedy of every problem."""

from __future__ import annotations

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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Failure
from ..utils import memory, resources

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from ..distributed.comm import Comm

INTERFACE = "GLOO_SOCKET_IFNAME"  # unset: lo
TIMEOUT_S = 90.0  # of all stages; on an idle machine they take about four seconds
MIN_SHM, MIN_DISK, MIN_MEMORY = 256e6, 2e9, 1e9  # bytes
EXTRAS = {
    "nbody": "recipes/nbody: simulating its data",
    "fluid": "recipes/fluid113k: simulating its data, or reading the published records",
    "protein": "recipes/protein: reading trajectories of molecular dynamics",
    "water3d": "recipes/water3d: reading TFRecord files",
    "tfn": "TFN and FastTFN: spherical harmonics and tensor products",
    "metis": "partitions by METIS whose parts follow weights",
    "viz": "pictures: report, render, plot.png of a sweep, the demo",
    "import": "distegnn import: molecular dynamics, VTK, ASE's formats, Parquet",
    "pyvista": "drawing a rollout's file with VTK",
    "dev": "make test, make lint",
}


@dataclass(frozen=True)
class Finding:
    """Result of a check. state: ok, note (nothing to repair) or problem; remedy: one line, for every problem."""

    check: str
    text: str
    state: str = "ok"
    remedy: str = ""


def problem(check: str, text: str, remedy: str, wrong: bool = True) -> Finding:
    """A problem if it is ``wrong``, otherwise ok."""
    return Finding(check, text, "problem", remedy) if wrong else Finding(check, text)


def check_versions(name: str = "dist_egnn") -> list[Finding]:
    """Compare Python and the installed packages with the metadata of this package, of its extras as well."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return [problem("versions", f"{name} is not installed", "make setup, or pip install -e . in the checkout")]
    requirements = [Requirement(text) for text in package.requires or []]
    version, allowed = platform.python_version(), package.metadata["Requires-Python"] or ""
    findings = [Finding("python", f"{version} ({sys.executable})")]
    if not SpecifierSet(allowed).contains(version, prereleases=True):
        findings = [problem("python", f"{version} is not {allowed}", "install Python 3.11 or 3.12, then make setup")]
    base = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    shown = ", ".join(f"{r.name} {metadata.version(r.name)}" for r in base[:5] if not _mismatches("versions", [r]))
    findings += _mismatches("versions", base) or [Finding("versions", f"{len(base)} packages fit: {shown}, …")]
    for extra, use in EXTRAS.items():
        check = f"extra {extra}"
        own = [r for r in requirements if r not in base and r.marker and r.marker.evaluate({"extra": extra})]
        mismatches = _mismatches(check, own)
        wrong = [finding for finding in mismatches if "is not installed" not in finding.text]
        if missing := ", ".join(finding.text.split()[0] for finding in mismatches):  # a note
            text, remedy = f"without {missing} ({use})", f"to add it: pip install 'dist_egnn[{extra}]'"
            findings.append(wrong[0] if wrong else Finding(check, text, "note", remedy))
        else:
            findings.append(Finding(check, f"installed ({use})"))
    return findings


def _mismatches(check: str, requirements: list[Requirement]) -> list[Finding]:
    """A problem for each requirement that the installed packages do not meet."""
    findings = []
    for r in requirements:
        try:
            version = metadata.version(r.name)
            wrong, state = not r.specifier.contains(version, prereleases=True), f"{version} is installed"
        except metadata.PackageNotFoundError:
            wrong, state = True, "is not installed"
        if wrong:
            text = f"{r.name} {state}, {r.specifier or 'any version'} is needed"
            findings.append(problem(check, text, f"pip install '{r.name}{r.specifier}'"))
    return findings


def check_threads() -> list[Finding]:
    """Compare OMP_NUM_THREADS with the available cores."""
    threads, remedy = os.environ.get("OMP_NUM_THREADS", ""), "export OMP_NUM_THREADS=1"
    cores = resources.available_cores()
    if threads and not re.fullmatch(r"[1-9]\d*", threads):
        return [problem("threads", f"OMP_NUM_THREADS={threads} is not a number of threads", remedy)]
    if threads and int(threads) > max(cores, 1):
        return [problem("threads", f"OMP_NUM_THREADS={threads} on {cores:g} cores makes DGL and torch slow", remedy)]
    text = f"{threads or 'all cores'} per process; {cores:g} of {os.cpu_count()} cores available"
    return [Finding("threads", text + " (control group)" * math.isfinite(resources.cpu_quota()))]


def check_memory() -> list[Finding]:
    free, limit = memory.available_memory(), memory.cgroup_limit()
    text = f"{free / 1e9:.1f} GB are free"
    text += "" if math.isinf(limit) else f"; limit of the control group: {limit / 1e9:.1f} GB"
    return [problem("memory", text, "end other programs, or raise the limit of the container", free < MIN_MEMORY)]


def check_disk() -> list[Finding]:
    """Free space for runs, stores and temporary files."""
    findings = []
    for folder in dict.fromkeys((Path.cwd(), Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        text = f"{free / 1e9:.1f} GB are free at {folder}"
        if os.access(folder, os.W_OK):
            remedy = "remove files, or use another disk (run.dir, --out, TMPDIR)"
            findings.append(problem("disk", text, remedy, free < MIN_DISK))
        else:
            findings.append(problem("disk", f"{folder} cannot be written", "use another folder, or set TMPDIR"))
    return findings


def check_shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Free space in /dev/shm, where DGL's servers hold graphs, and stale files of this user there."""
    if not folder.is_dir():
        return [Finding("shared memory", f"no {folder}: graph servers need it, training does not", "note")]
    findings, usage = [], shutil.disk_usage(folder)
    text = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB are free in {folder}"
    if usage.free < MIN_SHM:
        findings.append(problem("shared memory", text, "remove files there, or start the container with --shm-size=2g"))
    if stale := _stale_files(folder):
        remedy = f"rm {' '.join(map(str, stale[:5]))}" + " …" * (len(stale) > 5)
        size = sum(file.stat().st_size for file in stale) / 1e6
        findings.append(problem("shared memory", f"{len(stale)} stale files in {folder}, {size:.1f} MB", remedy))
    return findings or [Finding("shared memory", text)]


def _stale_files(folder: Path) -> list[Path]:
    """Files of this user that are older than a minute and neither mapped nor open in any of its processes."""
    files = [f for f in folder.iterdir() if f.is_file() and not f.is_symlink() and f.stat().st_uid == os.getuid()]
    files = [f for f in files if time.time() - f.stat().st_mtime > 60]
    used: set[str] = set()
    for process in Path("/proc").glob("[0-9]*") if files else ():
        with suppress(OSError):  # ended, or of another user
            maps = (process / "maps").read_text(encoding="utf-8").splitlines()
            used |= {line.split(maxsplit=5)[5] for line in maps if str(folder) in line}
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    used.add(os.readlink(descriptor))
    return sorted(f for f in files if str(f) not in used)


def check_network() -> list[Finding]:
    """Whether localhost can be connected to, and the network interface of the process group exists."""
    name, interfaces, findings = os.environ.get(INTERFACE, "lo"), [n for _, n in socket.if_nameindex()], []
    if name not in interfaces:
        text = f"{INTERFACE}={name}: no such network interface (known: {', '.join(interfaces)})"
        findings.append(problem("network", text, f"unset {INTERFACE}, or name a known interface"))
    try:
        address = socket.getaddrinfo("localhost", 0, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        with socket.create_server((str(address[0]), 0)) as server, socket.create_connection(server.getsockname(), 5):
            pass
    except OSError as error:
        remedy = "put '127.0.0.1 localhost' into /etc/hosts, and: ip link set lo up"
        findings.append(problem("network", f"localhost: {error}: processes cannot connect", remedy))
    return findings or [Finding("network", f"localhost is {address[0]}, processes connect on {name}")]


def try_torch() -> str:
    import torch

    return f"{torch.__version__} loads, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPU only'}"


def try_dgl() -> str:
    import dgl
    import torch

    graph = dgl.graph(([0, 1], [1, 0]))
    graph.ndata["x"] = torch.tensor([1.0, 2.0])
    graph.update_all(dgl.function.copy_u("x", "m"), dgl.function.sum("m", "y"))
    if graph.ndata["y"].tolist() != [2.0, 1.0]:
        raise Failure(f"{dgl.__version__} loads, but sums messages wrongly")
    return f"{dgl.__version__} loads and passes messages"


def try_native() -> str:
    from ..ops.native import library

    loaded = library.load()
    if loaded == library.STALE:
        raise Failure(f"compiled from another version of {library.SOURCE.name}; models run on the torch engine")
    if isinstance(loaded, str):
        return f"none ({loaded}); models run on the torch engine"
    return f"kernels for {loaded.level}{', with products in bfloat16' * loaded.bfloat16} (model.engine=auto uses them)"


def try_gpu(devices: Path = Path("/dev")) -> str:
    import torch

    from ..ops import message_passing

    if not torch.cuda.is_available():
        if any(devices.glob("nvidia[0-9]*")):
            raise Failure("there is a GPU, but torch cannot use it")
        return "none; training runs on the CPU"
    names = ", ".join(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))
    if float(torch.ones(8, device="cuda").sum()) != 8:
        raise Failure(f"{names}: torch computes wrong results")
    if message_passing.dgl_supports("cuda"):
        return f"{names}: torch and DGL use it (train.device=cuda)"
    return f"{names}: torch uses it (train.device=cuda); DGL is built without it: messages run by the torch engine"


def try_group() -> str:
    from ..distributed import spawn

    started = time.perf_counter()
    if spawn.run_ranks(_sum_of_ranks, 2, timeout_s=TIMEOUT_S / 3) != [1.0, 1.0]:
        raise Failure("two processes compute a wrong sum")
    return f"two processes connect and sum, {time.perf_counter() - started:.1f} s"


def _sum_of_ranks(group: Comm) -> float:
    import torch

    return float(group.sum(torch.tensor(float(group.rank))))


# stage → what it tries, and the remedy where that fails
STAGES: dict[str, tuple[Callable[[], str], str]] = {
    "torch": (try_torch, "make setup in a fresh checkout, or pip install --force-reinstall torch==2.13.0"),
    "dgl": (try_dgl, "pip install --force-reinstall --no-deps dgl==1.1.3 (with Python 3.12: dgl==2.1.0)"),
    "native": (try_native, "install a C++ compiler, then pip install -e . in the checkout"),
    "gpu": (try_gpu, "install a CUDA build of torch that fits the driver (see nvidia-smi), or set train.device=cpu"),
    "group": (try_group, f"check that the interface lo is up and no firewall blocks it; unset {INTERFACE}"),
}


def run_stages() -> None:
    """Print the finding of each stage as a line of JSON, as soon as it is known."""
    for stage, (attempt, remedy) in STAGES.items():
        try:
            finding = Finding(stage, attempt())
        except Failure as failure:
            finding = problem(stage, str(failure), remedy)
        print(json.dumps(asdict(finding)), flush=True)


def check_stages(command: list[str] | None = None, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Run `run_stages` in its own process, since a stage may hang or crash; the stages after that one are left out."""
    command = command or [sys.executable, "-P", "-c", "from dist_egnn.planning import doctor; doctor.run_stages()"]
    try:
        process = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s, check=False
        )
        out, lines, code = process.stdout, process.stderr.strip().splitlines(), process.returncode
        reason = f"ended by signal {-code}" if code < 0 else (lines or [f"exit code {code}"])[-1]
    except subprocess.TimeoutExpired as expired:
        out = (expired.stdout or b"").decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        reason = f"not done after {timeout_s:g} s"
    findings = [Finding(**json.loads(line)) for line in out.splitlines() if line.startswith('{"check"')]
    if len(findings) < len(STAGES):
        stage, (_, remedy) = list(STAGES.items())[len(findings)]
        findings.append(problem(stage, f"failed: {reason}", remedy))
    return findings


CHECKS = (check_versions, check_threads, check_memory, check_disk, check_shared_memory, check_network, check_stages)


def run_checks() -> list[Finding]:
    """The findings of all checks, in order. A check that fails itself is a problem."""
    findings = []
    for check in CHECKS:
        try:
            findings += check()
        except Exception as error:  # the other checks are still of use
            name, text = check.__name__.removeprefix("check_"), f"{type(error).__name__}: {error}"
            findings.append(problem(name.replace("_", " "), f"could not be checked: {text}", "please report this"))
    return findings
