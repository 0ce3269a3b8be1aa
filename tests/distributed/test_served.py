"""Trainers that read through DGL's servers do what they do without; servers refuse, survive, and leave nothing.

Machines are told apart by address and port, so several of them fit on this one. Run as a script, this file is a trainer.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_runs import assert_same, settings

from dist_egnn import config
from dist_egnn.data import graph_server
from dist_egnn.data.store import Part, Store
from dist_egnn.distributed import comm, spawn
from dist_egnn.errors import Failure
from dist_egnn.train import trainer as training

LIMIT_S = 60.0
HOST, LOOPBACK = "127.0.0.1", "0100007F"

pytestmark = pytest.mark.skipif(not graph_server.SHARED.is_dir(), reason="DGL's servers share graphs through /dev/shm")


def listens_on(pid: int | str) -> set[str]:
    """The addresses on which a process listens for TCP, in the kernel's hexadecimal."""
    found, links = set(), set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.add(os.readlink(file))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and f"socket:[{cells[9]}]" in links:
                found.add(cells[1].split(":")[0])
    return found


def chosen(path: Path, run: Path) -> config.Config:
    attributes = ",".join(Store(path).inputs["node_attributes"])
    return settings(path, run, "train.epochs=2", f"data.node_attributes=[{attributes}]")


def same(one: Part, other: Part) -> bool:
    fields = one.nodes.keys() == other.nodes.keys() and all(
        torch.equal(t, other.nodes[n]) for n, t in one.nodes.items()
    )
    return fields and one.inner == other.inner and torch.equal(one.src, other.src) and torch.equal(one.dst, other.dst)


def trainer(path: str, rank: str, ip_config: str, group: str, port: str, run: str) -> None:
    """Enter, compare every part with the disk's, and train; with no run to train, wait to be killed."""
    try:
        entered = graph_server.enter(Path(path), int(rank), Path(ip_config), int(group), HOST, int(port), "lo", LIMIT_S)
    except Failure as failure:
        print(f"error: {failure}")
        graph_server.leave(2)
    if not run:
        print("entered", flush=True)
        time.sleep(LIMIT_S)
    store = Store(path)
    assert type(store.source) is graph_server.ServerSource
    for machine in range(store.machines):
        assert same(store.source.part("shard-00000", machine), store.disk.part("shard-00000", machine)), machine
    assert listens_on("self") == {LOOPBACK}  # of rank 0 also torch's store, of all gloo's and DGL's
    training.train(entered, chosen(Path(path), Path(run)))
    graph_server.leave(0)


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def started(log: Path, *command: object) -> subprocess.Popen:
    with open(log, "w") as out:
        given = [sys.executable, *map(str, command)]
        return subprocess.Popen(given, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + LIMIT_S
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)


class Served:
    """The servers of a store on this machine, and trainers of theirs."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder, self.ip_config, self.store = path, folder, folder / "ip.txt", Store(path)
        *ports, self.port = free_ports(self.store.machines + 1)
        self.ip_config.write_text("".join(f"{HOST} {port}\n" for port in ports))
        self.places = graph_server.addresses(self.ip_config, self.store.machines)
        self.running: list[subprocess.Popen] = []

    def server(self, machine: int) -> subprocess.Popen:
        log = self.folder / f"server-{machine}.log"
        self.running.append(started(log, "-m", "dist_egnn.data.graph_server", self.path, machine, self.ip_config))
        wait_for(f"distegnn server {machine} ready on {self.places[machine]}\n", log, self.running[-1])
        return self.running[-1]

    def trainers(self, group: int, run: Path | str) -> list[tuple[subprocess.Popen, Path]]:
        made = []
        for rank in range(self.store.parts):
            log = self.folder / f"trainer-{group}-{rank}.log"
            made.append((started(log, __file__, self.path, rank, self.ip_config, group, self.port, run), log))
        self.running += [process for process, _ in made]
        return made

    def trained(self, group: int, run: Path) -> None:
        for process, log in self.trainers(group, run):
            assert process.wait(LIMIT_S) == 0, log.read_text()

    def left(self) -> list[Path]:
        return [file for place in self.places for file in place.files()]


@contextmanager
def serving_of(path: Path, folder: Path) -> Iterator[Served]:
    """Its servers, ready; ended in order, which must leave nothing."""
    found = Served(path, folder)
    try:
        servers = [found.server(machine) for machine in range(found.store.machines)]
        yield found
        for server in servers:
            if server.poll() is None:
                server.terminate()
                assert server.wait(LIMIT_S) == 0
        assert not found.left()
    finally:
        for process in found.running:
            process.kill()
            process.wait()
        for file in found.left():
            file.unlink()


@pytest.fixture
def one(make_store: Callable[..., Path]) -> Path:
    """A store for one machine with two trainers."""
    return make_store(1, shard_nodes=0, trainers=2)


def check(served: Served) -> None:
    """What its servers take, and where they listen."""
    for machine, place in enumerate(served.places):
        taken = sum(file.stat().st_size for file in place.files())
        assert taken <= graph_server.shared_bytes(served.store, machine) <= 1.2 * taken + (64 << 10)
        assert listens_on(served.running[machine].pid) == {LOOPBACK}


def test_training_does_not_know(make_store: Callable[..., Path], tmp_path: Path) -> None:
    """Own part or another machine's: all tensors are the disk's, and losses and weights those of a run from disk, bit for bit."""
    path = make_store(2, shard_nodes=0, node_attributes=[])
    spawn.run_ranks(training.train, 2, chosen(path, tmp_path / "local"))
    with serving_of(path, tmp_path) as served:
        check(served)
        served.trained(0, tmp_path / "served")
        # trainers that have the lines in another order
        served.ip_config.write_text("".join(f"{place.host} {place.port}\n" for place in reversed(served.places)))
        for rank, (process, log) in enumerate(served.trainers(1, tmp_path / "never")):
            assert process.wait(LIMIT_S) == 2
            assert f"serves partition {1 - rank}, rank {rank} needs {rank}" in log.read_text()
    assert_same(tmp_path / "served", tmp_path / "local")


def test_killed_trainers_and_servers(one: Path, tmp_path: Path) -> None:
    """A new group meets the same server, whether the last one died in its work or before it was connected; two trainers on its
    machine do what a run from disk does."""
    spawn.run_ranks(training.train, 2, chosen(one, tmp_path / "local"))
    with serving_of(one, tmp_path) as served:
        check(served)
        for group, said in enumerate(("entered", "waits on")):
            for process, log in (lost := served.trainers(group, "")):
                wait_for(said, log, process)
            for process, _ in lost:
                process.kill()
                process.wait()
        served.trained(2, tmp_path / "served")
        assert_same(tmp_path / "served", tmp_path / "local")
        server = served.running[0]
        with pytest.raises(Failure, match=f"process {server.pid} already serves there"):
            graph_server.clear(served.places[0])
        again = subprocess.run(
            [sys.executable, "-m", "dist_egnn.data.graph_server", one, "0", served.ip_config],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert again.returncode == 2
        assert again.stderr.splitlines()[-1].startswith(
            f"error: {served.places[0]}: process {server.pid} already serves there"
        )
        server.kill()
        server.wait()
        stranger = (
            graph_server.SHARED / f"dist_egnn~{HOST}~{served.places[0].port}0~x"
        )  # of a port that begins like ours
        stranger.touch()
        try:
            left = len(served.left())
            assert left > 10
            assert graph_server.clear(served.places[0]) == left
            assert stranger.exists()
        finally:
            stranger.unlink()


def test_what_a_server_refuses(
    one: Path, make_store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ip_config = tmp_path / "ip.txt"
    ip_config.write_text(f"{HOST} {free_ports(1)[0]}\n")
    damaged = Path(shutil.copytree(one, tmp_path / "damaged"))
    for name in ("graph.dgl", "node_feat.dgl", "edge_feat.dgl"):
        file = damaged / "shard-00000" / "part0" / name
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(Failure, match=f"{name}: its sha256 is not the manifest's"):
            graph_server.serve(damaged, 0, ip_config)
        file.write_bytes(before)
    with monkeypatch.context() as patch:
        patch.setattr(graph_server, "shared_bytes", lambda *_: 1 << 60)
        with pytest.raises(Failure, match=f"/dev/shm/dist_egnn~{HOST}~.*disk full: needs .* MB are free"):
            graph_server.serve(one, 0, ip_config)
    with pytest.raises(Failure, match="graphs, a server serves one; partition again with --shard-nodes 0"):
        graph_server.serve(make_store(1, shard_nodes=300), 0, ip_config)
    with pytest.raises(Failure, match="a part has no edges at all"):
        graph_server.serve(make_store(1, shard_nodes=0, edge_drop=1.0), 0, ip_config)
    with pytest.raises(Failure, match="names 1 machines, the store has 2"):
        graph_server.serve(make_store(2, shard_nodes=0), 0, ip_config)
    for line in ("0.0.0.0 4000", "localhost 4000", HOST, f"{HOST} 70000"):
        ip_config.write_text(line)
        with pytest.raises(Failure, match=r"ip\.txt: line 1 is not `ADDRESS PORT` of one interface"):
            graph_server.serve(one, 0, ip_config)


def test_trainers_without_a_server(make_store: Callable[..., Path], tmp_path: Path) -> None:
    """On their own machine, then on the other one."""
    served = Served(make_store(2, shard_nodes=0), tmp_path)
    with pytest.raises(Failure, match=f"{served.places[0]}: no server of this user .*start the server of machine 0"):
        graph_server.connect(served.path, 0, served.ip_config, 0, 4)
    code = "import sys; from pathlib import Path; from dist_egnn.data import graph_server; from dist_egnn.errors import Failure\n"
    code += f"try: graph_server.connect(Path({str(served.path)!r}), 0, Path({str(served.ip_config)!r}), 0, 4)\n"
    code += "except Failure as failure: print(failure, flush=True); graph_server.leave(3)"
    try:
        server = served.server(0)
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
        assert found.returncode == 3, found.stderr
        assert found.stdout.splitlines()[-1].startswith(f"{served.places[1]}: no graph server within 4 s")
    finally:
        server.terminate()
        assert server.wait(LIMIT_S) == 0
    assert not served.left()


def test_where_processes_meet() -> None:
    with pytest.raises(Failure, match="eth77: no network interface of this host"):
        comm.join_hosts(0, 2, HOST, 1, "eth77", 1.0)
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Failure, match=f"{HOST}:{port}: rank 0 cannot listen"):
            comm.join_hosts(0, 2, HOST, port, "lo", 1.0)
    with pytest.raises(Failure, match=f"{HOST}:{port}: rank 1 cannot connect to the other 1"):
        comm.join_hosts(1, 2, HOST, port, "lo", 1.0)


if __name__ == "__main__":
    trainer(*sys.argv[1:])
