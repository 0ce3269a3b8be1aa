"""`distegnn launch` on emulated hosts (docs/hosts.md): the same numbers as one machine, and what happens when something dies.

`make test-hosts` runs these. With DISTEGNN_OUTCOMES=docs/distributed.md in the environment it also writes there what happened
and how long it took, between the marks `<!-- outcomes -->` and `<!-- /outcomes -->`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small_data import DATA

from dist_egnn import config as configs
from dist_egnn.commands.train import run_training
from dist_egnn.train import checkpoint

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0  # of a whole launch; what is quicker is bounded by timeout_s
TIMEOUT_S = 6
SAME = ["epoch", "train_loss", "train_mse", "valid_mse", "grad_norm", "lr"]  # of metrics.csv: all but times and memory
SETTINGS = [
    *("data.radius=0.27", "data.horizon=3", "data.frames=3", "data.features=[mass, viscosity/max, speed]"),
    *(
        "data.node_attributes=[mass]",
        "data.last_frame=-1",
        "model.hidden=16",
        "model.layers=2",
        "train.checkpoint_minutes=0",
        "train.accumulate=1",
    ),
    f"train.timeout_s={TIMEOUT_S}",
]
_outcomes: dict[str, tuple[str, float]] = {}


def record(event: str, outcome: str, seconds: float) -> None:
    """A row of the table."""
    _outcomes[event] = (outcome, seconds)


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Write the table, if the environment names a page, once all is done."""
    yield
    page = os.environ.get("DISTEGNN_OUTCOMES")
    if page and _outcomes:
        rows = [
            f"| {event} | {outcome} | {f'{seconds:.0f} s' if seconds else ''} |"
            for event, (outcome, seconds) in _outcomes.items()
        ]
        lines = "\n".join(["| event | outcome | time to it |", "|---|---|---|", *rows])
        text = re.sub(
            r"(?s)(<!-- outcomes -->\n).*?(<!-- /outcomes -->)",
            lambda m: f"{m[1]}{lines}\n{m[2]}",
            Path(page).read_text(),
        )
        Path(page).write_text(text)


class Run:
    """A launch that is under way."""

    def __init__(self, hosts: Any, names: list[str], folder: Path, words: list[str], log: Path) -> None:
        self.hosts, self.names, self.folder = hosts, names, folder
        self.log = log
        self.begun = time.monotonic()
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dist_egnn.cli", "launch", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=ROOT,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, what: Callable[[], bool], said: str) -> None:
        """Until something is so, while the launch runs."""
        until = time.monotonic() + LIMIT_S
        while not what():
            assert self.process.poll() is None, f"ended before {said}:\n{self.text}"
            assert time.monotonic() < until, f"not {said} after {LIMIT_S} s:\n{self.text}"
            time.sleep(0.05)

    def epochs(self) -> int:
        """Epochs that are done."""
        path = self.folder / "metrics.csv"
        return max(len(path.read_text().splitlines()) - 1, 0) if path.exists() else 0

    def after(self, epochs: int) -> None:
        """Wait for so many more epochs."""
        wanted = self.epochs() + epochs
        self.wait_for(lambda: self.epochs() >= wanted, f"{wanted} epochs")

    def pid(self, host: str, what: str) -> int:
        """The process on a host whose command line has this in it, as seen from here."""
        return next(pid for pid, line in self.hosts.processes(host).items() if what in line)

    def end(self, code: int) -> float:
        """Wait for its exit code; nothing may be left on any host. Seconds since it began."""
        try:
            assert self.process.wait(LIMIT_S) == code, self.text
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {LIMIT_S} s:\n{self.text}")
        for name in self.names:
            assert self.hosts.processes(name) == {}
            assert self.hosts.shared(name) == []
        if (self.folder / "last.pt").exists():
            checkpoint.load_last(self.folder)
        return time.monotonic() - self.begun


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three emulated hosts for all tests of this file."""
    from hosts import Hosts, missing

    if reason := missing():
        pytest.skip(reason)
    with Hosts(["a", "b", "c"]) as hosts:
        yield hosts


@pytest.fixture
def launch(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """launch(store, names, *words, folder=…, hosts=…, lines=…): a launch on these hosts; killed after the test if it still runs."""
    started: list[Run] = []

    def start(
        store: Path, names: str, *words: str, folder: Path | None = None, hosts: Any = None, lines: str = ""
    ) -> Run:
        hosts = hosts or cluster
        file = tmp_path / "hosts.txt"
        file.write_text(lines or "\n".join(names))
        folder = folder or tmp_path / "run"
        ssh = " ".join(hosts.ssh)
        options = ["--hosts", str(file), "--ssh", ssh]
        config = ["recipes/fluid113k/config.yaml", f"data.path={store}", f"run.dir={folder}", *SETTINGS]
        if "--resume" in words:
            config = []
        log = tmp_path / f"launch-{len(started)}.log"
        started.append(Run(hosts, list(names), folder, [*config, *words, *options], log))
        return started[-1]

    yield start
    for run in started:
        run.process.kill()
        run.process.wait()
    cluster.heal()
    cluster.set(delay_ms=0, loss=0)


@pytest.fixture(scope="module")
def alone(make_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pd.DataFrame]:
    """alone(store, epochs): metrics of the same training by local processes, without servers."""
    done: dict[tuple[Path, int], pd.DataFrame] = {}

    def train(store: Path, epochs: int) -> pd.DataFrame:
        if (store, epochs) not in done:
            folder = tmp_path_factory.mktemp("alone") / "run"
            given = [f"data.path={store}", f"run.dir={folder}", *SETTINGS, f"train.epochs={epochs}"]
            run_training(configs.load(ROOT / "recipes/fluid113k/config.yaml", given))
            done[store, epochs] = pd.read_csv(folder / "metrics.csv")
        return done[store, epochs]

    return train


def equal(run: Run, alone: pd.DataFrame) -> None:
    """Losses of every epoch, bit for bit."""
    found = pd.read_csv(run.folder / "metrics.csv")
    pd.testing.assert_frame_equal(found[SAME], alone[SAME], check_exact=True)


def equal_so_far(run: Run, alone: pd.DataFrame) -> None:
    """As equal, of the epochs that both have, which are several."""
    found = pd.read_csv(run.folder / "metrics.csv")
    both = min(len(found), len(alone))
    assert both >= 5
    pd.testing.assert_frame_equal(found[SAME].iloc[:both], alone[SAME].iloc[:both], check_exact=True)


@pytest.mark.parametrize(("names", "trainers"), [("ab", 2), ("abc", 1)])
def test_the_losses_of_one_machine(names, trainers, launch, alone, make_store):
    """Two hosts with one trainer each: test_hosts_that_share_no_files."""
    store = make_store(len(names), trainers=trainers, shard_nodes=0)
    run = launch(store, names, "train.epochs=2")
    seconds = run.end(0)
    equal(run, alone(store, 2))
    assert "best validation MSE" in run.text
    record(f"{len(names)} hosts × {trainers} trainers", "2 epochs, the losses of one machine bit for bit", seconds)


def test_what_dies_comes_back(launch, alone, make_store, cluster):
    """One run that loses a trainer, a server, a link for 10 s and a whole host ends like one that lost nothing."""
    store, epochs = make_store(2, trainers=1, shard_nodes=0), 400
    run = launch(store, "ab", f"train.epochs={epochs}", "train.timeout_s=15", "--max-restarts", "3")
    run.after(1)
    began = time.monotonic()
    cluster.cut("a", "b")
    time.sleep(10)
    cluster.heal()
    run.after(1)
    assert "restart 1" not in run.text
    record("a link is cut for 10 s (timeout 15 s)", "goes on without a restart", time.monotonic() - began)
    for event, what in (
        ("kill -9 of a trainer", "launch.trainer"),
        ("kill -9 of a server", "dist_egnn.data.graph_server"),
    ):
        began = time.monotonic()
        os.kill(run.pid("b", what), signal.SIGKILL)
        run.wait_for(
            lambda what=what: f"restart {1 + ('graph_server' in what)} of 3" in run.text, f"restarted after {event}"
        )
        run.after(1)
        record(event, "restarted from the last checkpoint", time.monotonic() - began)
    began = time.monotonic()
    cluster.kill("b")
    cluster.revive("b")
    run.wait_for(lambda: "restart 3 of 3" in run.text, "restarted after the host came back")
    run.after(1)
    record("a host loses power and comes back", "restarted from the last checkpoint", time.monotonic() - began)
    run.process.send_signal(signal.SIGTERM)  # what is shown of the end is shown by Ctrl-C elsewhere
    run.end(75)
    equal_so_far(run, alone(store, 6))


def test_a_host_that_stays_away(launch, make_store, cluster):
    run = launch(make_store(2, trainers=1, shard_nodes=0), "ab", "train.epochs=1000", "--max-restarts", "1")
    run.after(1)
    began = time.monotonic()
    cluster.kill("b")
    run.names = ["a"]
    run.end(2)
    record("a host loses power for good", "ends: " + cause(run), time.monotonic() - began)
    cluster.revive("b")
    assert "host b" in cause(run)


def cause(run: Run) -> str:
    """The last line, as the user sees it."""
    line = run.text.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ").split(";")[0]


def test_a_link_cut_for_good(launch, make_store, cluster):
    run = launch(make_store(2, trainers=1, shard_nodes=0), "ab", "train.epochs=1000", "--max-restarts", "1")
    run.after(1)
    began = time.monotonic()
    cluster.cut("a", "b")
    run.end(2)
    record("a link is cut for good", "ends: " + cause(run), time.monotonic() - began)


def test_a_slow_link_then_ctrl_c_and_on_again(launch, alone, make_store, cluster):
    """A step waits for one round trip a layer and direction, and one for the gradients; nothing of it changes a loss."""
    store, per_delay = make_store(2, trainers=1, shard_nodes=0), 1
    run = launch(store, "ab", "train.epochs=1000", "train.timeout_s=30")
    run.after(1)
    taken: dict[int, float] = {}
    for delay_ms in (0, 20, 40):
        cluster.set(delay_ms=delay_ms)
        run.after(1 + per_delay)  # the first is of both
        taken[delay_ms] = float(pd.read_csv(run.folder / "metrics.csv")["step_s"].iloc[-per_delay:].median())
        record(f"{delay_ms} ms delay, each way", f"{taken[delay_ms]:.2f} s a step", 0)
    cluster.set(delay_ms=0, loss=0.02)
    run.after(1 + per_delay)
    step = float(pd.read_csv(run.folder / "metrics.csv")["step_s"].iloc[-per_delay:].median())
    record("2% of packets are lost", f"the same losses, {step:.2f} s a step", 0)
    cluster.set(loss=0)
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    run.end(75)
    record("Ctrl-C", "a checkpoint, then exit code 75", time.monotonic() - began)
    assert f"go on: distegnn launch --resume {run.folder}" in run.text
    done = run.epochs()
    again = launch(store, "ab", "--resume", str(run.folder), f"train.epochs={done + 2}")
    again.end(0)
    equal(again, alone(store, done + 2))
    trips = (taken[40] - taken[0]) / 0.080
    record(
        "… so a step of 2 layers", f"waits for {trips:.1f} round trips: 2 layers × 2 directions, and the gradients", 0
    )
    assert trips < 2 * 2 + 1 + 1  # the last one is for what a busy machine adds


def fill(path: Path) -> None:
    """Write until there is no room."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_no_room_for_a_checkpoint(launch, make_store, tmp_path):
    from hosts import Hosts, missing

    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", folder], check=True)
    try:
        with Hosts(["a", "b"]) as hosts:
            run = launch(
                make_store(2, trainers=1, shard_nodes=0), "ab", "train.epochs=1000", folder=folder / "run", hosts=hosts
            )
            run.after(1)
            began = time.monotonic()
            fill(folder / "filler")
            run.end(2)
            record(
                "the disk is full at a checkpoint",
                "ends: " + cause(run).replace(str(folder), "…"),
                time.monotonic() - began,
            )
            assert "cannot be written" in cause(run)
            (folder / "filler").unlink()
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_before_anything_starts(launch, make_store, cluster, tmp_path):
    """What is found before a server or a trainer starts: one line, and nothing was begun."""
    store = make_store(2, trainers=1, shard_nodes=0)
    other = tmp_path / "elsewhere"
    shutil.copytree(
        ROOT / "dist_egnn", other / "dist_egnn", symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    (other / "dist_egnn" / "data" / "fields.py").write_text(
        "# another version\n" + (other / "dist_egnn" / "data" / "fields.py").read_text()
    )
    python = other / "python"
    python.write_text(f'#!/bin/sh\ncd {other} && PYTHONPATH={other} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    server = cluster.run("b", [sys.executable, "-c", TAKE_PORT], stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    cases: list[tuple[str, list[str], str, str]] = [
        ("a port is taken", ["--port", "29700"], "", "host b: port 29700 of .* in use"),
        ("a host is missing", [], "a\nnowhere", "host nowhere: no agent answers"),
        ("another version on one host", [], f"a\nb python={python}", "host b: has other code of dist_egnn"),
        ("a store for other hosts", [], "a\nb\nc", "partition again with --parts 3"),
    ]
    for event, words, lines, said in cases:
        run = launch(store, "a", "train.epochs=1", *words, lines=lines or "a\nb")
        seconds = run.end(2)
        assert re.search(said, cause_whole(run)), run.text
        assert not run.folder.exists()
        record(event, "ends: " + cause(run).replace(str(store), "store"), seconds)
    server.kill()
    server.wait()


TAKE_PORT = "import socket, time; s = socket.create_server(('', 29700)); print('ready', flush=True); time.sleep(100)"


def cause_whole(run: Run) -> str:
    return run.text.strip().splitlines()[-1]


def test_hosts_that_share_no_files(launch, alone, make_store, tmp_path):
    """Each host has a disk of its own: its part comes by --dispatch; only the first one ever sees the run's folder."""
    from hosts import Hosts, missing

    if reason := missing():
        pytest.skip(reason)
    store = make_store(2, trainers=1, shard_nodes=0)
    disk = tmp_path / "disk"
    disk.mkdir()
    copied = disk / "store"
    with Hosts(["a", "b"], private=[disk]) as hosts:
        shutil.copytree(store, copied)
        run = launch(copied, "ab", "train.epochs=1", hosts=hosts)
        assert "has no whole store" in _ended(run, 2)
        dispatch = ["--dispatch"] if shutil.which("rsync") else []
        for name in "" if dispatch else "ab":
            shutil.copytree(store, hosts.inside(name, copied))
        run = launch(copied, "ab", *dispatch, "train.epochs=2", folder=disk / "run", hosts=hosts)
        record(
            "2 hosts × 1 trainers, which share no files", "2 epochs, the losses of one machine bit for bit", run.end(0)
        )
        there = hosts.inside("b", copied)
        assert (there / "shard-00000/part1/node_feat.dgl").exists()
        assert dispatch == [] or not (there / "shard-00000/part0").exists()
        found = pd.read_csv(hosts.inside("a", disk / "run/metrics.csv"))
        pd.testing.assert_frame_equal(found[SAME], alone(store, 2)[SAME], check_exact=True)
        with open(there / "parts.csv", "a") as file:
            file.write("\n")
        (there / "manifest.yaml").write_text((there / "manifest.yaml").read_text() + "# changed\n")
        run = launch(copied, "ab", "train.epochs=2", folder=disk / "again", hosts=hosts)
        text = _ended(run, 2)
        assert "host b: " in text
        assert "another store there than on a" in text
        record(
            "a store differs on one host",
            "ends: " + cause(run).replace(str(copied), "store"),
            time.monotonic() - run.begun,
        )


def test_slurm_names_the_hosts(make_store, cluster, tmp_path):
    """scontrol and srun are stand-ins: the one expands a list, the other reaches an emulated host as srun reaches a node."""
    ssh = " ".join(cluster.ssh)
    for name, script in {
        "scontrol": "printf 'a\\nb\\n'",
        "srun": f'for w; do case $w in --nodelist=*) node=${{w#*=}};; sh) break;; esac; shift; done; exec {ssh} $node "$3"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    store = make_store(2, trainers=1, shard_nodes=0)
    words = [
        "recipes/fluid113k/config.yaml",
        f"data.path={store}",
        f"run.dir={tmp_path / 'run'}",
        *SETTINGS,
        "--dry-run",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dist_egnn.cli", "launch", *words],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "[a-b]"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert "reaches every other host" in done.stdout
    assert re.search(r"b +net0 +10\.77\.0\.2:\(free\) +1 ", done.stdout)


@pytest.mark.skipif(shutil.which("sshd") is None, reason="needs sshd (Debian: openssh-server)")
def test_through_ssh_itself(make_store, cluster, tmp_path, alone):
    """The launcher is on host a and reaches both by ssh over the emulated network; that is cut, for the agent on b as well."""
    for key in ("host", "mine"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    (tmp_path / "authorized").write_text((tmp_path / "mine.pub").read_text())
    Path("/run/sshd").mkdir(exist_ok=True)
    options = (
        f"-oHostKey={tmp_path}/host -oAuthorizedKeysFile={tmp_path}/authorized -oStrictModes=no -oPidFile=none".split()
    )
    for name in "ab":
        cluster.run(name, [shutil.which("sshd"), "-D", "-e", "-f", "/dev/null", "-oPermitRootLogin=yes", *options])
    ssh = f"ssh -F none -i {tmp_path}/mine -oStrictHostKeyChecking=no -oUserKnownHostsFile=/dev/null -oBatchMode=yes"
    (tmp_path / "hosts.txt").write_text("10.77.0.1\nroot@10.77.0.2 port=22\n")
    store, folder = make_store(2, trainers=1, shard_nodes=0), tmp_path / "run"
    words = ["recipes/fluid113k/config.yaml", f"data.path={store}", f"run.dir={folder}", *SETTINGS, "train.epochs=1000"]
    words += ["--hosts", str(tmp_path / "hosts.txt"), "--ssh", ssh, "--max-restarts", "1"]
    log = tmp_path / "log"
    with open(log, "w") as out:
        argv = [sys.executable, "-m", "dist_egnn.cli", "launch", *words]
        launcher = cluster.run("a", argv, cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    run = Run.__new__(Run)
    run.hosts, run.names, run.folder, run.log, run.process, run.begun = (
        cluster,
        ["b"],
        folder,
        log,
        launcher,
        time.monotonic(),
    )
    try:
        run.after(1)
        began = time.monotonic()
        cluster.cut("a", "b")
        assert launcher.wait(LIMIT_S) == 2, run.text
        record("the network of a host is gone for good, ssh too", "ends: " + cause(run), time.monotonic() - began)
        until = time.monotonic() + LIMIT_S
        while any("dist_egnn" in line for line in cluster.processes("b").values()):
            assert time.monotonic() < until, cluster.processes("b")
            time.sleep(0.2)
        assert cluster.shared("b") == []
        checkpoint.load_last(folder)
    finally:
        launcher.kill()
        launcher.wait()
        for name in "ab":
            for pid in cluster.processes(name):
                os.kill(pid, signal.SIGKILL)


def _ended(run: Run, code: int) -> str:
    run.end(code)
    return cause_whole(run)


def test_the_settings_are_those_of_the_stores():
    """SETTINGS repeats DATA, of which the fixtures make stores."""
    settings = configs.load(None, SETTINGS).data
    assert {name: getattr(settings, name) for name in DATA} == DATA
