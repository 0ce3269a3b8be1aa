"""`distegnn launch` on emulated hosts (docs/hosts.md): the losses of one machine, and restarts after failures.

`make test-hosts` runs these. With DISTEGNN_OUTCOMES=docs/distributed.md in the environment, they also write there what
happened and how long it took, between the marks `<!-- outcomes -->` and `<!-- /outcomes -->`.

Runs that a fault must hit are endless. Their time-out is long, except where a test waits for it to pass.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hosts import Hosts, missing
from processes import GUARD_S, wait_until
from small_data import DATA

from dist_egnn import config as configs
from dist_egnn.commands.train import run_training
from dist_egnn.train import checkpoint

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[2]
CONFIG = "recipes/fluid113k/config.yaml"
LAUNCH = [sys.executable, "-m", "dist_egnn.cli", "launch"]
NUMBERS = ["epoch", "train_loss", "train_mse", "valid_mse", "grad_norm", "lr"]  # of metrics.csv: not times and memory
SETTINGS = [f"data.{key}={value}" for key, value in DATA.items()]  # with which the fixtures make stores
SETTINGS += ["data.last_frame=-1", "data.velocity=backward", "model.hidden=16", "model.layers=2"]
SETTINGS += ["train.checkpoint_minutes=0", "train.accumulate=1", "train.patience=0", "train.timeout_s=60"]
SETTINGS += ["train.valid_interval=1"]  # a run that is stopped has validated its last epoch
ENDLESS, SHORT_TIMEOUT = "train.epochs=1000000000", "train.timeout_s=15"
_outcomes: dict[str, tuple[str, float]] = {}


def settings(store: Path, folder: Path) -> list[str]:
    return [CONFIG, f"data.path={store}", f"run.dir={folder}", *SETTINGS]


def record(event: str, outcome: str, seconds: float) -> None:
    """Add a row to the table of outcomes."""
    _outcomes[event] = (outcome, seconds)


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Write the table at the end, if the environment names a page."""
    yield
    if _outcomes and (page := os.environ.get("DISTEGNN_OUTCOMES")):
        rows = [f"| {event} | {outcome} | {f'{s:.0f} s' if s else ''} |" for event, (outcome, s) in _outcomes.items()]
        lines = "\n".join(["| event | outcome | time to it |", "|---|---|---|", *rows])
        marks = r"(?s)(<!-- outcomes -->\n).*?(<!-- /outcomes -->)"
        text = re.sub(marks, lambda m: f"{m[1]}{lines}\n{m[2]}", Path(page).read_text(encoding="utf-8"))
        Path(page).write_text(text, encoding="utf-8")


@dataclass
class Run:
    """A launch in progress."""

    hosts: Any
    names: str
    folder: Path
    log: Path
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def cause(self) -> str:
        """The last error, up to the remedy."""
        line = [line for line in self.text.splitlines() if line.startswith("error: ")][-1]
        return line.removeprefix("error: ").split(";")[0]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds, while the launch runs."""
        try:
            wait_until(condition, what, self.process)
        except AssertionError as error:
            pytest.fail(f"{error}\n{self.text}")

    def epochs(self) -> int:
        path = self.folder / "metrics.csv"
        return max(len(path.read_text().splitlines()) - 1, 0) if path.exists() else 0

    def wait_for_epochs(self, more: int = 1) -> None:
        end = self.epochs() + more
        self.wait_for(lambda: self.epochs() >= end, f"{end} epochs")

    def pid(self, host: str, what: str) -> int:
        """A process of a host by a part of its command line, as seen from here."""
        return next(pid for pid, line in self.hosts.processes(host).items() if what in line)

    def end(self, code: int) -> float:
        """Wait for an exit code; nothing may be left on any host. Returns the seconds since the start."""
        try:
            assert self.process.wait(GUARD_S) == code, self.text
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {GUARD_S} s:\n{self.text}")
        for name in self.names:
            assert self.hosts.processes(name) == {}
            assert self.hosts.shared(name) == []
        if (self.folder / "last.pt").exists():
            checkpoint.last_state(self.folder)
        return time.monotonic() - self.started


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three emulated hosts for the tests of this file."""
    if reason := missing():
        pytest.skip(reason)
    with Hosts(["a", "b", "c"]) as hosts:
        yield hosts


@pytest.fixture
def launch(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """launch(store, names, *words): a launch on these hosts; killed after the test if it still runs."""
    started: list[Run] = []

    def start(store: Path, names: str, *words: str, folder: Path = tmp_path / "run", hosts=cluster, lines="") -> Run:
        file, log = tmp_path / "hosts.txt", tmp_path / f"launch-{len(started)}.log"
        file.write_text(lines or "\n".join(names))
        words = (*(() if "--resume" in words else settings(store, folder)), *words)
        command = [*LAUNCH, *words, "--hosts", str(file), "--ssh", " ".join(hosts.ssh)]
        with open(log, "w", encoding="utf-8") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT)
        started.append(Run(hosts, names, folder, log, process))
        return started[-1]

    yield start
    for run in started:
        run.process.kill()
        run.process.wait()
    cluster.heal()
    cluster.set(delay_ms=0, loss=0)


@pytest.fixture(scope="module")
def store_of_two(make_store: Callable[..., Path]) -> Path:
    """A store for two hosts with one trainer each."""
    return make_store(2, trainers=1, shard_nodes=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pd.DataFrame]:
    """alone(store, epochs): metrics of the same training by local processes, without servers."""

    @cache
    def train(store: Path, epochs: int) -> pd.DataFrame:
        folder = tmp_path_factory.mktemp("alone") / "run"
        file, *overrides = settings(store, folder)
        run_training(configs.load(ROOT / file, [*overrides, f"train.epochs={epochs}"]))
        return pd.read_csv(folder / "metrics.csv")[NUMBERS]

    return train


def assert_equal(folder: Path, alone: pd.DataFrame) -> None:
    """Losses of all epochs are equal bit for bit."""
    metrics = pd.read_csv(folder / "metrics.csv")[NUMBERS]
    pd.testing.assert_frame_equal(metrics, alone, check_exact=True)


def test_the_losses_of_one_machine(launch, alone, make_store, cluster):
    """Several trainers on a host: test_hosts_that_share_no_files."""
    store = make_store(3, shard_nodes=0)
    before = cluster.counts()["a", "b"]["bytes"]
    run = launch(store, "abc", "train.epochs=2")
    seconds = run.end(0)
    assert cluster.counts()["a", "b"]["bytes"] > before + 1e5  # over this network
    assert_equal(run.folder, alone(store, 2))
    assert "best validation MSE" in run.text
    record("3 hosts × 1 trainers", "2 epochs, the losses of one machine bit for bit", seconds)


def test_a_run_survives_failures(launch, alone, store_of_two, cluster):
    """A run that loses a trainer, a server, a link for a while, and a whole host has the losses of an undisturbed one.

    It is stopped by SIGTERM and resumed over a slow link, on which packets are lost, until Ctrl-C.
    """
    run = launch(store_of_two, "ab", ENDLESS, "--max-restarts", "3")
    run.wait_for_epochs()
    start, lost = time.monotonic(), cluster.counts()["a", "b"]["lost"]
    cluster.cut("a", "b")
    run.wait_for(lambda: cluster.counts()["a", "b"]["lost"] >= lost + 3, "packets lost")
    cluster.heal()
    run.wait_for_epochs()
    assert "restart 1" not in run.text
    record("a link is cut until three packets are lost", "goes on without a restart", time.monotonic() - start)

    def power_loss() -> None:
        cluster.kill("b")
        cluster.revive("b")

    faults = {
        "kill -9 of a trainer": lambda: os.kill(run.pid("b", "launch.trainer"), signal.SIGKILL),
        "kill -9 of a server": lambda: os.kill(run.pid("b", "graph_server"), signal.SIGKILL),
        "a host loses power and comes back": power_loss,
    }
    for restart, (event, inject) in enumerate(faults.items(), 1):
        start = time.monotonic()
        inject()
        run.wait_for(lambda restart=restart: f"restart {restart} of 3" in run.text, f"restart after {event}")
        run.wait_for_epochs()
        record(event, "restarted from the last checkpoint", time.monotonic() - start)
    run.process.send_signal(signal.SIGTERM)
    run.end(75)
    assert f"distegnn launch --resume {run.folder}" in run.text
    run = launch(store_of_two, "ab", "--resume", str(run.folder))
    run.wait_for_epochs()
    measure_slow_links(run)
    start = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    run.end(75)
    record("Ctrl-C", "a checkpoint, then exit code 75", time.monotonic() - start)
    assert_equal(run.folder, alone(store_of_two, run.epochs()))


def measure_slow_links(run: Run) -> None:
    """Record how long a step takes with delays and with lost packets."""

    def step_s() -> float:
        run.wait_for_epochs(2)  # the first had the old settings in part
        return float(pd.read_csv(run.folder / "metrics.csv")["step_s"].iloc[-1])

    taken: dict[int, float] = {}
    for delay_ms in (0, 20, 40):
        run.hosts.set(delay_ms=delay_ms)
        taken[delay_ms] = step_s()
        record(f"{delay_ms} ms delay, each way", f"{taken[delay_ms]:.2f} s a step", 0)
    trips = (taken[40] - taken[0]) / 0.080
    outcome = f"waits for {trips:.1f} round trips: 2 layers × 2 directions, and the gradients"
    record("… so a step of 2 layers", outcome, 0)
    run.hosts.set(delay_ms=0, loss=0.02)
    record("2% of packets are lost", f"the same losses, {step_s():.2f} s a step", 0)
    run.hosts.set(loss=0)


@pytest.mark.parametrize("event", ["a host loses power for good", "a link is cut for good"])
def test_a_fault_that_stays(event, launch, store_of_two, cluster):
    run = launch(store_of_two, "ab", ENDLESS, SHORT_TIMEOUT, "--max-restarts", "1")
    run.wait_for_epochs()
    start = time.monotonic()
    if "link" in event:
        cluster.cut("a", "b")
    else:
        cluster.kill("b")
        run.names = "a"
    run.end(2)
    if "link" not in event:
        cluster.revive("b")
        assert "host b" in run.cause
    record(event, "ends: " + run.cause, time.monotonic() - start)


def test_no_room_for_a_checkpoint(launch, store_of_two, make_hosts, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", folder], check=True)
    try:  # hosts see the mounts of the time when they start
        run = launch(store_of_two, "ab", ENDLESS, folder=folder / "run", hosts=make_hosts("a", "b"))
        run.wait_for_epochs()
        start = time.monotonic()
        subprocess.run(["cp", "/dev/zero", folder / "filler"])  # until the disk is full
        run.end(2)
        outcome = "ends: " + run.cause.replace(str(folder), "…")
        record("the disk is full at a checkpoint", outcome, time.monotonic() - start)
        assert "cannot be written" in run.cause
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_errors_before_anything_starts(launch, store_of_two, cluster, tmp_path):
    """One line names the host and the remedy, and no folder is made."""
    other = tmp_path / "elsewhere"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dist_egnn", other / "dist_egnn", symlinks=True, ignore=ignore)
    (other / "dist_egnn" / "another.py").write_text("")
    python = other / "python"
    python.write_text(f'#!/bin/sh\ncd {other} && PYTHONPATH={other} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    server = cluster.run("b", [sys.executable, "-u", "-m", "http.server", "29700"], stdout=subprocess.PIPE)
    server.stdout.readline()
    cases = [
        ("a port is taken", ["--port", "29700"], "a\nb", "host b: port 29700 of .* in use"),
        ("a host is missing", [], "a\nnowhere", "host nowhere: no agent answers"),
        ("another version on one host", [], f"a\nb python={python}", "host b: has other code of dist_egnn"),
        ("a store for other hosts", [], "a\nb\nc", ".*distegnn partition .* --parts 3"),
    ]
    for event, words, lines, message in cases:
        run = launch(store_of_two, "a", "train.epochs=1", *words, lines=lines)
        seconds = run.end(2)
        assert re.search(f"error: {message}", run.text), run.text
        assert not run.folder.exists()
        record(event, "ends: " + run.cause.replace(str(store_of_two), "store"), seconds)
    server.kill()
    server.wait()


def test_hosts_that_share_no_files(launch, alone, make_store, make_hosts, tmp_path):
    """Each host has a disk of its own: --dispatch copies its part; only the first one sees the run's folder."""
    store = make_store(2, trainers=2, shard_nodes=0)
    disk = tmp_path / "disk"
    disk.mkdir()
    copied = disk / "store"
    hosts = make_hosts("a", "b", private=[disk])
    shutil.copytree(store, copied)
    run = launch(copied, "ab", "train.epochs=1", hosts=hosts)
    run.end(2)
    assert "host b: has no whole store" in run.text
    dispatch = ["--dispatch"] if shutil.which("rsync") else []
    for name in "" if dispatch else "ab":
        shutil.copytree(store, hosts.inside(name, copied))
    run = launch(copied, "ab", *dispatch, "train.epochs=2", folder=disk / "run", hosts=hosts)
    seconds = run.end(0)
    record("2 hosts × 2 trainers, which share no files", "2 epochs, the losses of one machine bit for bit", seconds)
    there = hosts.inside("b", copied)
    assert (there / "shard-00000/part1/node_feat.dgl").exists()
    assert dispatch == [] or not (there / "shard-00000/part0").exists()
    assert_equal(hosts.inside("a", disk / "run"), alone(store, 2))
    for name, text in {"parts.csv": "\n", "manifest.yaml": "# changed\n"}.items():
        with open(there / name, "a", encoding="utf-8") as file:
            file.write(text)
    run = launch(copied, "ab", "train.epochs=2", folder=disk / "again", hosts=hosts)
    seconds = run.end(2)
    assert re.search(r"error: host b: .*--dispatch", run.text)
    record("a store differs on one host", "ends: " + run.cause.replace(str(copied), "store"), seconds)


def test_hosts_of_a_slurm_job(store_of_two, cluster, tmp_path):
    """Stand-ins: scontrol expands a list of nodes, srun reaches an emulated host as it reaches a node."""
    srun = "for w; do case $w in --nodelist=*) node=${w#*=};; sh) break;; esac; shift; done\n"
    srun += f'exec {" ".join(cluster.ssh)} $node "$3"'
    for name, script in {"scontrol": "printf 'a\\nb\\n'", "srun": srun}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "[a-b]"}
    command = [*LAUNCH, *settings(store_of_two, tmp_path / "run"), "--dry-run"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode == 0, done.stderr
    assert "reaches every other host" in done.stdout
    assert re.search(r"b +net0 +10\.77\.0\.2:\(free\) +1 ", done.stdout)


@pytest.mark.skipif(shutil.which("sshd") is None, reason="needs sshd (Debian: openssh-server)")
def test_through_ssh_itself(store_of_two, cluster, tmp_path):
    """The launcher on host a reaches both hosts by ssh over the emulated network, which is then cut for good."""
    for key in ("host", "mine"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    (tmp_path / "authorized").write_text((tmp_path / "mine.pub").read_text())
    Path("/run/sshd").mkdir(exist_ok=True)
    files = f"-oHostKey={tmp_path}/host -oAuthorizedKeysFile={tmp_path}/authorized -oStrictModes=no -oPidFile=none"
    for name in "ab":
        sshd = [shutil.which("sshd"), "-D", "-e", "-f", "/dev/null", "-oPermitRootLogin=yes"]
        cluster.run(name, [*sshd, *files.split()])
    ssh = f"ssh -F none -i {tmp_path}/mine -oStrictHostKeyChecking=no -oUserKnownHostsFile=/dev/null -oBatchMode=yes"
    (tmp_path / "hosts.txt").write_text("10.77.0.1\nroot@10.77.0.2 port=22\n")
    folder, log = tmp_path / "run", tmp_path / "log"
    argv = [*LAUNCH, *settings(store_of_two, folder), ENDLESS, SHORT_TIMEOUT, "--hosts", str(tmp_path / "hosts.txt")]
    argv += ["--ssh", ssh, "--max-restarts", "1"]
    with open(log, "w", encoding="utf-8") as out:
        launcher = cluster.run("a", argv, cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    run = Run(cluster, "b", folder, log, launcher)
    try:
        run.wait_for_epochs()
        start = time.monotonic()
        cluster.cut("a", "b")
        assert launcher.wait(GUARD_S) == 2, run.text
        record("the network of a host is gone for good, ssh too", "ends: " + run.cause, time.monotonic() - start)
        wait_until(lambda: not any("dist_egnn" in line for line in cluster.processes("b").values()), "an empty host b")
        assert cluster.shared("b") == []
        checkpoint.last_state(folder)
    finally:
        launcher.kill()
        launcher.wait()
        cluster.heal()
        for name in "ab":
            for pid in cluster.processes(name):
                os.kill(pid, signal.SIGKILL)
