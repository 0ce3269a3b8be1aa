"""Training through DGL's graph servers equals training from disk; servers survive trainers and leave nothing behind.

Machines are addresses with ports, so several fit on one host.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from processes import GUARD_S, free_ports, wait_until
from small_data import EDGES
from tiny_runs import assert_same, settings

from dist_egnn import config
from dist_egnn.data import graph_server
from dist_egnn.data.store import Part, Store, open_store
from dist_egnn.distributed import comm, spawn
from dist_egnn.errors import Failure
from dist_egnn.train import trainer as training

SHORT_S = 10  # how long a trainer looks for a server that does not exist
MakeStore = Callable[..., Path]
HOST = "127.0.0.1"
HOST_IN_PROC = f"{int.from_bytes(socket.inet_aton(HOST), sys.byteorder):08X}"

no_shared_memory = not graph_server.SHARED.is_dir()
pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(no_shared_memory, reason="DGL's servers share graphs through /dev/shm"),
]


def listening_addresses(pid: int | str = "self") -> set[str]:
    """The addresses on which a process listens for TCP, as /proc writes them: hexadecimal, in the host's byte order."""
    sockets = {file.resolve().name for file in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line for table in Path(f"/proc/{pid}/net").glob("tcp*") for line in table.read_text().splitlines()[1:]]
    rows = [row for row in map(str.split, lines) if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]  # 0A: LISTEN
    return {row[1].partition(":")[0] for row in rows}


def config_of(path: Path, run: Path) -> config.Config:
    inputs = Store(path).inputs
    keys = [f"data.{name}={inputs[name]}" for name in ("edges", "radius", "neighbours")]
    attributes = ",".join(inputs["node_attributes"])
    return settings(path, run, "train.epochs=2", f"data.node_attributes=[{attributes}]", *keys)


def equal(a: Part, b: Part) -> bool:
    fields = a.nodes.keys() == b.nodes.keys() and all(torch.equal(t, b.nodes[name]) for name, t in a.nodes.items())
    return fields and a.inner == b.inner and torch.equal(a.src, b.src) and torch.equal(a.dst, b.dst)


def trainer(path: str, rank: str, ip_config: str, group: str, port: str, run: str, limit_s: str = str(GUARD_S)) -> None:
    """Connect, compare every part with the disk's, and train; without a run, wait to be killed."""
    try:
        size = graph_server.connect(Path(path), int(rank), Path(ip_config), int(group), float(limit_s))
        trainers = comm.join_hosts(int(rank), size, HOST, int(port), "lo", GUARD_S)
    except Failure as failure:
        print(f"error: {failure}")
        graph_server.leave(2)
    if not run:
        print("entered", flush=True)
        signal.pause()
    store = open_store(path)
    assert type(store.source) is graph_server.ServerSource
    for machine in range(store.machines):
        assert equal(store.source.part("shard-00000", machine), store.disk.part("shard-00000", machine)), machine
    assert listening_addresses() == {HOST_IN_PROC}  # torch's store on rank 0, gloo's and DGL's sockets on all
    training.train(trainers, config_of(Path(path), Path(run)))
    graph_server.leave(0)


def server(*words: str) -> None:
    """`python -m dist_egnn.data.graph_server`."""
    sys.argv[1:] = words
    graph_server.main()


class Program(ForkServerProcess):
    """function(*words) in a fork of a process that has imported torch and DGL; its output is in a log."""

    def __init__(self, log: Path, function: Callable[..., None], *words: object) -> None:
        super().__init__(daemon=True)
        self.log, self.function, self.words = log, function, [*map(str, words)]
        log.touch()
        spawn.start_forkserver("dist_egnn.train.trainer")
        with spawn.without_script():
            self.start()

    def run(self) -> None:
        with open(self.log, "w", encoding="utf-8") as out:
            for stream in (1, 2):
                os.dup2(out.fileno(), stream)
        self.function(*self.words)

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, limit_s: float | None = None) -> int | None:
        self.join(limit_s)
        return self.exitcode


def wait_for(text: str, log: Path, process: Program) -> None:
    try:
        wait_until(lambda: text in log.read_text(encoding="utf-8"), text, process)
    except AssertionError as error:
        pytest.fail(f"{error}\n{log.read_text(encoding='utf-8')}")


class Cluster:
    """The servers of a store on this host, and their trainers."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder, self.ip_config, self.store = path, folder, folder / "ip.txt", Store(path)
        *ports, self.port = free_ports(self.store.machines + 1)
        self.ip_config.write_text("".join(f"{HOST} {port}\n" for port in ports))
        self.addresses = graph_server.addresses(self.ip_config, self.store.machines)
        self.processes: list[Program] = []

    def start_server(self, machine: int) -> Program:
        process = Program(log := self.folder / f"server-{machine}.log", server, self.path, machine, self.ip_config)
        self.processes.append(process)
        wait_for(f"distegnn server {machine} ready on {self.addresses[machine]}\n", log, process)
        return process

    def start_trainers(self, group: int, run: Path | str) -> list[tuple[Program, Path]]:
        logs = [self.folder / f"trainer-{group}-{rank}.log" for rank in range(self.store.parts)]
        given = (self.ip_config, group, self.port, run)
        trainers = [Program(log, trainer, self.path, rank, *given) for rank, log in enumerate(logs)]
        self.processes += trainers
        return list(zip(trainers, logs, strict=True))

    def train(self, group: int, run: Path) -> None:
        for process, log in self.start_trainers(group, run):
            assert process.wait(GUARD_S) == 0, log.read_text()

    def shared_files(self) -> list[Path]:
        return [file for address in self.addresses for file in address.files()]


@contextmanager
def running_servers(path: Path, folder: Path) -> Iterator[Cluster]:
    """The servers of a store. Verifies their size and addresses, and that they leave nothing after SIGTERM."""
    cluster = Cluster(path, folder)
    try:
        servers = [cluster.start_server(machine) for machine in range(cluster.store.machines)]
        for machine, address in enumerate(cluster.addresses):
            size = sum(file.stat().st_size for file in address.files())
            assert size <= graph_server.shared_bytes(cluster.store, machine) <= 1.2 * size + (64 << 10)
            assert listening_addresses(servers[machine].pid) == {HOST_IN_PROC}
        yield cluster
        for process in servers:
            if process.poll() is None:
                process.terminate()
                assert process.wait(GUARD_S) == 0
        assert not cluster.shared_files()
    finally:
        for process in cluster.processes:
            process.kill()
            process.wait()
        for file in cluster.shared_files():
            file.unlink()


@pytest.fixture
def one(make_store: MakeStore) -> Path:
    """A store for one machine with two trainers."""
    return make_store(1, shard_nodes=0, trainers=2)


def test_training_through_servers_equals_training_from_disk(make_store: MakeStore, tmp_path: Path) -> None:
    """Own part or another machine's: tensors, losses and weights are those of a run from disk, bit for bit.

    Edges from the nearest nodes: they are not symmetric.
    """
    path = make_store(2, shard_nodes=0, node_attributes=[], **EDGES["knn"])
    spawn.run_ranks(training.train, 2, config_of(path, tmp_path / "local"))
    with running_servers(path, tmp_path) as cluster:
        cluster.train(0, tmp_path / "served")
        # trainers whose ip_config has the lines in another order
        cluster.ip_config.write_text("".join(f"{a.host} {a.port}\n" for a in reversed(cluster.addresses)))
        for rank, (process, log) in enumerate(cluster.start_trainers(1, tmp_path / "never")):
            assert process.wait(GUARD_S) == 2
            assert f"serves partition {1 - rank}, rank {rank} needs {rank}" in log.read_text()
    assert_same(tmp_path / "served", tmp_path / "local")


def test_killed_trainers_and_servers(one: Path, tmp_path: Path) -> None:
    """A new group connects to the same server after the last one was killed, at work or before it was connected."""
    spawn.run_ranks(training.train, 2, config_of(one, tmp_path / "local"))
    with running_servers(one, tmp_path) as cluster:
        for group, line in enumerate(("entered", "waits on")):
            for process, log in (trainers := cluster.start_trainers(group, "")):
                wait_for(line, log, process)
            for process, _ in trainers:
                process.kill()
                process.wait()
        cluster.train(2, tmp_path / "served")
        assert_same(tmp_path / "served", tmp_path / "local")
        first, address = cluster.processes[0], cluster.addresses[0]
        with pytest.raises(Failure, match=f"process {first.pid} already serves there"):
            graph_server.clear(address)
        second = Program(log := tmp_path / "second.log", server, one, 0, cluster.ip_config)
        assert second.wait(GUARD_S) == 2
        assert f"error: {address}: process {first.pid} already serves there" in log.read_text()
        first.kill()
        first.wait()
        other = graph_server.SHARED / f"dist_egnn~{HOST}~{address.port}0~x"  # of a port that begins with these digits
        other.touch()
        try:
            count = len(cluster.shared_files())
            assert count > 10
            assert graph_server.clear(address) == count
            assert other.exists()
        finally:
            other.unlink()


def test_what_a_server_refuses(one, make_store, tmp_path, monkeypatch):
    ip_config = tmp_path / "ip.txt"
    ip_config.write_text(f"{HOST} {free_ports(1)[0]}\n")
    damaged = Path(shutil.copytree(one, tmp_path / "damaged"))
    for name in ("graph.dgl", "node_feat.dgl", "edge_feat.dgl"):
        file = damaged / "shard-00000" / "part0" / name
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(Failure, match=f"{name}: .*sha256 .*`rm -r {damaged}`"):
            graph_server.serve(damaged, 0, ip_config)
        file.write_bytes(before)
    for message, path, machine in (
        ("distegnn partition .* --shard-nodes 0", make_store(1, shard_nodes=300), 0),
        ("train without servers", make_store(1, shard_nodes=0, edge_drop=1.0), 0),
        ("names 1 machines, the store has 2", make_store(2, shard_nodes=0), 0),
        ("machine -1: .*machines 0 to 0", one, -1),
        ("machine 1: .*machines 0 to 0", one, 1),
    ):
        with pytest.raises(Failure, match=message):
            graph_server.serve(path, machine, ip_config)
    monkeypatch.setattr(graph_server, "shared_bytes", lambda *_: 1 << 60)
    with pytest.raises(Failure, match=f"/dev/shm/dist_egnn~{HOST}~.*disk full"):
        graph_server.serve(one, 0, ip_config)
    for line in ("0.0.0.0 4000", "localhost 4000", HOST, f"{HOST} 70000"):
        ip_config.write_text(line)
        with pytest.raises(Failure, match=r"ip\.txt: line 1 is not `ADDRESS PORT`"):
            graph_server.serve(one, 0, ip_config)


def test_trainers_without_a_server(make_store: MakeStore, tmp_path: Path) -> None:
    """No server on the trainer's machine, then none on the other one."""
    cluster = Cluster(make_store(2, shard_nodes=0), tmp_path)
    with pytest.raises(Failure, match=f"{cluster.addresses[0]}: no server .*start the server of machine 0"):
        graph_server.connect(cluster.path, 0, cluster.ip_config, 0, SHORT_S)
    try:
        only = cluster.start_server(0)
        process = Program(
            log := tmp_path / "trainer.log", trainer, cluster.path, 0, cluster.ip_config, 0, 0, "", SHORT_S
        )
        assert process.wait(GUARD_S) == 2
        assert f"error: {cluster.addresses[1]}: no graph server within {SHORT_S} s" in log.read_text()
    finally:
        only.terminate()
        assert only.wait(GUARD_S) == 0
    assert not cluster.shared_files()


def test_trainers_that_cannot_meet() -> None:
    with pytest.raises(Failure, match="eth77: no network interface"):
        comm.join_hosts(0, 2, HOST, 1, "eth77", 1.0)
    with socket.create_server((HOST, 0)) as occupied:
        port = occupied.getsockname()[1]
        with pytest.raises(Failure, match=f"{HOST}:{port}: rank 0 cannot listen"):
            comm.join_hosts(0, 2, HOST, port, "lo", 1.0)
    with pytest.raises(Failure, match=f"{HOST}:{port}: rank 1 cannot connect to the other 1"):
        comm.join_hosts(1, 2, HOST, port, "lo", 1.0)
