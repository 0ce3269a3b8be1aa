"""DGL's graph servers over a store: the server of one machine, and trainers that read through servers.

A *machine* is a line ``ADDRESS PORT`` of DGL's ip_config: where the server of the partition of this number listens.
"""

from __future__ import annotations

import argparse
import functools
import ipaddress
import json
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import dgl
import torch
from dgl.distributed import DistGraph, DistGraphServer, rpc
from dgl.distributed.graph_partition_book import get_shared_mem_partition_book

from ..distributed import comm
from ..errors import Failure
from ..utils.console import guard_streams
from ..utils.filesystem import check_free_space
from ..utils.memory import graph_server_bytes
from ..utils.signals import STOP_SIGNALS
from . import dgl_compat
from .store import Part, Store, open_store
from .store_inputs import another, node_floats

SHARED = Path("/dev/shm")
RETRY_S = 3.0  # between two of DGL's attempts to connect


class Address(NamedTuple):
    """Where a machine's server listens."""

    host: str
    port: int

    @property
    def name(self) -> str:
        """DGL's name of the served graph, and the prefix of the names of everything the server shares."""
        return f"dist_egnn~{self.host}~{self.port}~"

    def files(self) -> list[Path]:
        """The files in /dev/shm of a server at this address, alive or dead."""
        return [file for file in SHARED.iterdir() if file.name.startswith(self.name)]

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def addresses(ip_config: Path, machines: int) -> list[Address]:
    """The addresses in an ip_config. Raises Failure unless it has this many, each an IPv4 address and a port."""
    result: list[Address] = []
    try:
        for line in ip_config.read_text(encoding="utf-8").splitlines():
            host, port = line.split()
            if ipaddress.IPv4Address(host).is_unspecified or not 0 < int(port) < 1 << 16:
                raise ValueError
            result.append(Address(host, int(port)))
    except OSError as error:
        raise Failure(f"{ip_config}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Failure(f"{ip_config}: line {len(result) + 1} is not `ADDRESS PORT` of one interface (IPv4)") from error
    if len(result) != machines or len(set(result)) != machines:
        raise Failure(f"{ip_config}: names {len(set(result))} machines, the store has {machines}; name each once")
    return result


def server_address(store: Store, machine: int, ip_config: Path) -> Address:
    """Where a machine's server listens. Raises Failure for an invalid ip_config or a machine that does not exist."""
    if not 0 <= machine < store.machines:
        raise Failure(f"machine {machine}: {store.path} has machines 0 to {store.machines - 1}; name one of them")
    return addresses(ip_config, store.machines)[machine]


@contextmanager
def _exclusive(here: Address) -> Iterator[None]:
    """Hold the lock of an address; Failure if another server holds it. The kernel frees it when the process ends."""
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0{here.name}")
        except OSError as error:
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(f"\0{here.name}")
                credentials = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid = struct.unpack("3i", credentials)[0]
            raise Failure(f"{here}: process {pid} already serves there; end it, or choose another port") from error
        lock.listen()
        yield


def _unlink(here: Address) -> int:
    try:
        for file in (files := here.files()):
            file.unlink(missing_ok=True)
    except PermissionError as error:
        raise Failure(f"{error.filename}: belongs to another user; choose another port than {here.port}") from error
    return len(files)


def clear(here: Address) -> int:
    """Remove what a killed server left in /dev/shm; returns the number of files. Raises Failure if one runs there."""
    with _exclusive(here):
        return _unlink(here)


def shared_bytes(store: Store, machine: int) -> int:
    """The size of what the server of a machine puts into /dev/shm."""
    table = store.parts_table[store.parts_table["part"] // store.trainers == machine]
    nodes, edges, halo = table[["nodes", "edges", "halo"]].sum().tolist()
    return graph_server_bytes(nodes, edges, halo, node_floats(store.inputs), store.trainers)


def _exit_on_signals(here: Address) -> None:
    """Clean up and exit on a stop signal. Call it before any thread starts: threads inherit the signal mask."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def wait() -> None:  # the main thread waits inside DGL, where Python's handlers do not run
        signal.sigwait(STOP_SIGNALS)
        _unlink(here)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def serve(path: Path, machine: int, ip_config: Path, replicas: int = 1) -> None:
    """Serve a machine's partition to ``replicas`` groups of trainers, one a part, until a signal ends this process.

    Prints a line once trainers may connect. Raises Failure for several graphs, damaged files, a full /dev/shm,
    and DGL 2.
    """
    dgl_compat.check_servers()
    store = open_store(path)
    here = server_address(store, machine, ip_config)
    with _exclusive(here):
        _unlink(here)
        config = _dgl_config(store, machine, here)
        check_free_space(SHARED / here.name, shared_bytes(store, machine))
        _exit_on_signals(here)
        dgl_compat.set_machine(machine, here.host, here.name)
        dgl_compat.ignore_lost_trainers()
        dgl_compat.print_when_listening(f"distegnn server {machine} ready on {here}")
        try:
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="dist_egnn-", suffix=".json") as file:
                json.dump(config, file)
                file.flush()
                rpc.reset()
                options: dict[str, Any] = {"graph_format": ["coo", "csc"], "keep_alive": True, "net_type": "tensorpipe"}
                server = DistGraphServer(machine, str(ip_config), 1, store.parts * replicas, file.name, **options)
            server.start()
        finally:
            _unlink(here)


def _dgl_config(store: Store, machine: int, here: Address) -> dict[str, Any]:
    """DGL's partition config of the store's only graph, renamed after this server; verifies the partition's files."""
    shards = store.snapshots["shard"].unique()
    if (graphs := len(shards)) > 1:
        remedy = another(store.path, store.inputs, shard_nodes=0)
        raise Failure(f"{store.path}: has {graphs} graphs, a server serves one; {remedy}")
    if not store.parts_table["edges"].groupby(store.parts_table["part"] // store.trainers).sum().all():
        raise Failure(f"{store.path}: a part has no edges at all, which DGL cannot share; train without servers")
    config, own = json.loads(store.disk.config(shards[0], machine).read_text(encoding="utf-8")), f"part-{machine}"
    files = {kind: str(store.path.absolute() / shards[0] / name) for kind, name in config[own].items()}
    return config | {"graph_name": here.name, own: files}


class ServerSource:
    """Parts of the store's only graph: this machine's from shared memory without a copy, others pulled from servers."""

    def __init__(self, graph: DistGraph, machine: int, servers: list[Address], timeout_s: float) -> None:
        self.graph, self.machine, self.servers, self.timeout_s = graph, machine, servers, timeout_s
        self.part: Callable[[str, int], Part] = functools.lru_cache(1)(self._load)

    def _load(self, shard: str, part: int) -> Part:
        if part != self.machine:
            with _exit_after(self.timeout_s, f"{self.servers[part]}: part {part} did not arrive"):
                return self._pull(part)
        graph = self.graph.local_partition
        nodes = {name: field.local_partition for name, field in self.graph.ndata.items()}
        inner = len(nodes["gid"])
        src, dst = graph.edges(order="eid")
        return Part(src, dst, inner, nodes, graph.ndata[dgl.NID][inner:])

    def _pull(self, part: int) -> Part:
        book = self.graph.get_partition_book()
        own, edges = book.partid2nids(part), book.partid2eids(part)
        nodes = {
            name: field[own] if field.local_partition.numel() else field.local_partition.new_empty(len(own), 0)
            for name, field in self.graph.ndata.items()
        }
        src, dst = (ends - own[0] for ends in self.graph.find_edges(edges))
        # halo nodes in the order of the disk's: by snapshot, then by id
        outside = (src < 0) | (src >= len(own))
        halo, which = src[outside].unique(return_inverse=True)
        snapshot = torch.empty_like(halo).scatter_(0, which, nodes["snapshot"][dst[outside]])
        order = snapshot.argsort(stable=True)
        position = torch.empty_like(halo)
        position[order] = torch.arange(len(halo))
        src[outside] = len(own) + position[which]
        return Part(src, dst, len(own), nodes, halo[order] + own[0])


@contextmanager
def _exit_after(timeout_s: float, what: str) -> Iterator[None]:
    """Exit with one line if the block takes longer than timeout_s: no exception can interrupt DGL's C++ code."""

    def end() -> None:
        print(f"error: {what} within {timeout_s:g} s; is every host up and reachable?", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def connect(path: Path, rank: int, ip_config: Path, group: int, timeout_s: float, replicas: int = 1) -> int:
    """Make this process read a store through its servers; returns the number of trainers, which call this together.

    rank: torch's, which determines the part (rank mod P). group: a new number for each start of the trainers. Raises
    Failure if a server is not reached or serves another partition; ends the process after timeout_s.
    """
    store = open_store(path)
    machine = rank % store.parts // store.trainers
    here = (servers := addresses(ip_config, store.machines))[machine]
    ours = {file.stat().st_uid for file in here.files()} == {os.getuid()}  # DGL unpickles what is shared
    if not ours or (book := get_shared_mem_partition_book(here.name)) is None:
        raise Failure(f"{here}: no server of this user shares a graph; start the server of machine {machine} first")
    if book.partid != machine:
        raise Failure(f"{here}: serves partition {book.partid}, rank {rank} needs {machine}; correct ip_config")
    os.environ.update(DGL_ROLE="client", DGL_DIST_MODE="distributed", DGL_NUM_SERVER="1", DGL_NUM_SAMPLER="0")
    os.environ.update(DGL_GROUP_ID=str(group), DGL_DIST_MAX_TRY_TIMES=str(max(1, int(timeout_s / RETRY_S))))
    dgl_compat.set_machine(machine, here.host, here.name)
    names, trainers = ", ".join(map(str, servers)), store.parts * replicas
    with _exit_after(timeout_s + RETRY_S, f"{names}: these servers and {trainers} trainers did not all meet"):
        try:
            dgl.distributed.initialize(str(ip_config), net_type="tensorpipe")
        except rpc.DistConnectError as error:
            where = re.search(r"\[(.*?)\]", error.message)
            message = f"no graph server within {timeout_s:g} s; is it running and reachable?"
            raise Failure(f"{where[1] if where else names}: {message}") from error
        dgl_compat.skip_exit_barrier()
        graph = DistGraph(here.name)
    store.source = ServerSource(graph, machine, servers, timeout_s)  # for whoever opens this path in this process
    return trainers


def leave(code: int) -> NoReturn:
    """End a trainer without DGL's and torch's exit handlers, which wait for peers that may be gone."""
    if code == 0:
        comm.leave_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Serve one machine's partition of a store, or with --clear remove what its killed server left in shared memory."""
    guard_streams()
    parser = argparse.ArgumentParser(prog="python -m dist_egnn.data.graph_server", description=main.__doc__)
    for name, kind in (("store", Path), ("machine", int), ("ip_config", Path)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--clear", action="store_true")
    args = parser.parse_args()
    try:
        if args.clear:
            here = server_address(open_store(args.store), args.machine, args.ip_config)
            print(f"{clear(here)} files removed from {SHARED}")
        else:
            serve(args.store, args.machine, args.ip_config, args.replicas)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
