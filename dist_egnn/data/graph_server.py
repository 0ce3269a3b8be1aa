"""DGL's graph servers over a store: the server of one machine, and a trainer that reads through it.

A *machine* is a line of DGL's ip_config, ``ADDRESS PORT``: line m is where the server of partition m listens. DGL 1.1.3 names what
it shares after the fields of the graph alone, asks the operating system which machine it is on, and ends in a barrier. Here
(seam.py) a machine is its line, what it shares has a name that begins with that line's, and a process ends when it wants to.
"""

from __future__ import annotations

import argparse
import atexit
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import dgl
import torch
from dgl.distributed import dist_context, rpc
from dgl.distributed.dist_graph import DistGraph, DistGraphServer
from dgl.distributed.graph_partition_book import get_shared_mem_partition_book

from ..distributed import comm
from ..errors import Failure
from ..utils.disk import check_room
from ..utils.resources import served_bytes
from . import dgl_compat
from .store import Part, Store, set_source

SHARED = Path("/dev/shm")
TRY_S = 3.0  # from one of DGL's attempts to connect to the next


@dataclass(frozen=True)
class Address:
    """Where a machine's server listens, there only."""

    host: str
    port: int

    @property
    def name(self) -> str:
        """DGL's name of the graph that is served here; all that this server shares has one that begins like it."""
        return f"dist_egnn~{self.host}~{self.port}~"

    def files(self) -> list[Path]:
        """What a server here, alive or dead, has put into /dev/shm."""
        return [file for file in SHARED.iterdir() if file.name.startswith(self.name)]

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def addresses(ip_config: Path, machines: int) -> list[Address]:
    """The machines of an ip_config. Raises Failure unless there are as many lines as named, each an IPv4 address and a port."""
    found = []
    try:
        for line in ip_config.read_text().splitlines():
            host, port = line.split()
            if ipaddress.IPv4Address(host).is_unspecified or not 0 < int(port) < 1 << 16:
                raise ValueError
            found.append(Address(host, int(port)))
    except OSError as error:
        raise Failure(f"{ip_config}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Failure(f"{ip_config}: line {len(found) + 1} is not `ADDRESS PORT` of one interface (IPv4)") from error
    if len(found) != machines or len(set(found)) != machines:
        raise Failure(f"{ip_config}: names {len(set(found))} machines, the store is cut for {machines}; name each once")
    return found


@contextmanager
def _held(here: Address) -> Iterator[None]:
    """Be the only server here, or Failure. A socket of Linux's abstract namespace: it ends with its process, however that ends."""
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0{here.name}")
        except OSError as error:
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(f"\0{here.name}")
                credentials = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid = struct.unpack("3i", credentials)[0]
            raise Failure(f"{here}: process {pid} serves there already; end it, or name another port") from error
        lock.listen()
        yield


def _unlink(here: Address) -> int:
    files = here.files()
    try:
        for file in files:
            file.unlink(missing_ok=True)
    except PermissionError as error:
        raise Failure(f"{error.filename}: another user's; name another port than {here.port}") from error
    return len(files)


def clear(here: Address) -> int:
    """Remove what a killed server left in /dev/shm, and nothing else; how many files. Failure if a server lives there."""
    with _held(here):
        return _unlink(here)


def shared_bytes(store: Store, machine: int) -> int:
    """What the server of a machine takes of its /dev/shm."""
    table = store.parts_table[store.parts_table["part"] // store.trainers == machine]
    nodes, edges, halo = (int(table[name].sum()) for name in ("nodes", "edges", "halo"))
    floats = 9 + len(store.inputs["features"]) + len(store.inputs["node_attributes"])
    return served_bytes(nodes, edges, halo, floats, store.trainers)


def _end_on_signals(here: Address) -> None:
    """End this process in order on SIGTERM or SIGINT. To be called before there are threads, which inherit the mask."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:  # the main thread waits inside DGL, where Python's handlers would not be heard
        signal.sigwait(signals)
        _unlink(here)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def serve(path: Path, machine: int, ip_config: Path, replicas: int = 1) -> None:
    """Serve a machine's partition until a signal ends this process; says so on standard output once trainers may connect.

    replicas: groups of trainers that read the store, a trainer a part in each. Raises Failure for a store that cannot be served
    from one graph, that is not as its manifest says, or has no room here.
    """
    store = Store(path)
    here = addresses(ip_config, store.machines)[machine]
    with _held(here):
        _unlink(here)
        config = _config(store, machine, here)
        check_room(SHARED / here.name, shared_bytes(store, machine))
        _end_on_signals(here)
        dgl_compat.mean_this_machine(machine, here.host, here.name)
        dgl_compat.tolerate_lost_groups()
        dgl_compat.say_when_listening(f"distegnn server {machine} ready on {here}")
        try:
            with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
                named = Path(folder) / "served.json"
                named.write_text(json.dumps(config))
                rpc.reset()
                server = DistGraphServer(
                    machine,
                    str(ip_config),
                    1,
                    store.parts * replicas,
                    str(named),
                    graph_format=["coo", "csc"],
                    keep_alive=True,
                    net_type="tensorpipe",
                )
            server.start()
        finally:
            _unlink(here)


def _config(store: Store, machine: int, here: Address) -> dict[str, Any]:
    """DGL's partition config of the store's only graph, under this server's name, the partition's files being checked."""
    shards = store.snapshots["shard"].unique()
    if len(shards) > 1:
        raise Failure(
            f"{store.path}: has {len(shards)} graphs, a server serves one; partition again with --shard-nodes 0"
        )
    if not store.parts_table["edges"].groupby(store.parts_table["part"] // store.trainers).sum().all():
        raise Failure(f"{store.path}: a part has no edges at all, which DGL cannot share; train without servers")
    folder = store.path.absolute() / shards[0]
    config = json.loads(store.disk.config(shards[0], machine).read_text())
    config["graph_name"] = here.name
    for kind, name in config[f"part-{machine}"].items():
        config[f"part-{machine}"][kind] = str(folder / name)
    return config


class ServerSource:
    """Parts of the store's only graph: this machine's from shared memory, without a copy; another's pulled from its server."""

    def __init__(self, graph: DistGraph, machine: int, places: list[Address], timeout_s: float) -> None:
        self.graph, self.machine, self.places, self.timeout_s = graph, machine, places, timeout_s
        self._kept: tuple[int, Part] | None = None

    def part(self, shard: str, part: int) -> Part:
        if self._kept is None or self._kept[0] != part:
            with _bounded(self.timeout_s, f"{self.places[part]}: part {part} did not arrive"):
                self._kept = part, self._local() if part == self.machine else self._pulled(part)
        return self._kept[1]

    def _local(self) -> Part:
        graph = self.graph.local_partition
        src, dst = graph.edges(order="eid")
        nodes = {name: field.local_partition for name, field in self.graph.ndata.items()}
        inner = len(nodes["gid"])
        return Part(src, dst, inner, nodes, graph.ndata[dgl.NID][inner:])

    def _pulled(self, part: int) -> Part:
        book = self.graph.get_partition_book()
        own, edges = book.partid2nids(part), book.partid2eids(part)
        nodes = {
            name: field[own] if field.local_partition.numel() else field.local_partition.new_empty(len(own), 0)
            for name, field in self.graph.ndata.items()
        }
        src, dst = (ends - own[0] for ends in self.graph.find_edges(edges))
        # halo nodes: snapshot after snapshot, in each by number
        away = (src < 0) | (src >= len(own))
        halo, which = src[away].unique(return_inverse=True)
        snapshot = torch.empty_like(halo).scatter_(0, which, nodes["snapshot"][dst[away]])
        order = snapshot.argsort(stable=True)
        place = torch.empty_like(halo)
        place[order] = torch.arange(len(halo))
        src[away] = len(own) + place[which]
        return Part(src, dst, len(own), nodes, halo[order] + own[0])


@contextmanager
def _bounded(timeout_s: float, what: str) -> Iterator[None]:
    """End the process with one line if the block takes longer: inside DGL's C++ no exception reaches it."""

    def end() -> None:
        print(f"error: {what} within {timeout_s:g} s; is every host there and reachable?", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_shared(here: Address, rank: int, machine: int) -> None:
    """Raise Failure unless the rank's partition is served on this machine, by this user: DGL unpickles what is shared there."""
    ours = {file.stat().st_uid for file in here.files()} == {os.getuid()}
    book = get_shared_mem_partition_book(here.name) if ours else None
    if book is None:
        raise Failure(
            f"{here}: no server of yours shares a graph on this machine; start {machine}'s here, then rank {rank}"
        )
    if book.partid != machine:
        raise Failure(
            f"{here}: serves partition {book.partid}, rank {rank} needs {machine}; start its server with {machine}"
        )


def machine_of(rank: int, parts: int, trainers: int) -> int:
    """The machine of a rank: of each `train.replicas` group of P ranks, so many trainers are on each machine in turn."""
    return rank % parts // trainers


def connect(path: Path, rank: int, ip_config: Path, group: int, timeout_s: float, replicas: int = 1) -> None:
    """Read a store through its servers, which are ready, from now on in this process. All trainers of a group call it, and
    wait for each other.

    rank: torch's, which alone says what is ours, part rank mod P; DGL's own is ignored. group: a new number whenever trainers
    start again. Raises Failure where servers cannot be reached, or this machine's serves another partition than the rank's;
    ends the process after timeout_s.
    """
    store = Store(path)
    machine = machine_of(rank, store.parts, store.trainers)
    listed = addresses(ip_config, store.machines)
    here = listed[machine]
    _check_shared(here, rank, machine)
    os.environ.update(
        DGL_ROLE="client",
        DGL_DIST_MODE="distributed",
        DGL_NUM_SERVER="1",
        DGL_NUM_SAMPLER="0",
        DGL_GROUP_ID=str(group),
        DGL_DIST_MAX_TRY_TIMES=str(max(1, int(timeout_s / TRY_S))),
    )
    dgl_compat.mean_this_machine(machine, here.host, here.name)
    everybody, clients = ", ".join(map(str, listed)), store.parts * replicas
    with _bounded(timeout_s + TRY_S, f"{everybody}: these servers and {clients} trainers did not all meet"):
        try:
            dgl.distributed.initialize(str(ip_config), net_type="tensorpipe")
        except rpc.DistConnectError as error:
            peer = re.search(r"\[(.*?)\]", error.message)
            where = peer[1] if peer else everybody
            raise Failure(
                f"{where}: no graph server within {timeout_s:g} s; does it run, can it be reached?"
            ) from error
        atexit.unregister(dist_context.exit_client)  # a barrier of all trainers
        graph = DistGraph(here.name)
    set_source(store.path, ServerSource(graph, machine, listed, timeout_s))


def enter(
    path: Path,
    rank: int,
    ip_config: Path | None,
    group: int,
    address: str,
    port: int,
    interface: str,
    timeout_s: float,
    replicas: int = 1,
) -> comm.Comm:
    """What a trainer on a host begins with: connect to the servers, if there are any, then join the other trainers.

    ip_config: None, and parts are read from this host's disk. The rest as in `connect` and `comm.meet`.
    """
    if ip_config is not None:
        connect(path, rank, ip_config, group, timeout_s, replicas)
    return comm.meet(rank, Store(path).parts * replicas, address, port, interface, timeout_s)


def leave(code: int) -> NoReturn:
    """End a trainer: what DGL and torch would do at an exit waits for peers that may be gone."""
    if code == 0:
        comm.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """python -m dist_egnn.data.graph_server STORE MACHINE IP_CONFIG; --clear removes what that server left when it was killed."""
    parser = argparse.ArgumentParser(prog="python -m dist_egnn.data.graph_server", description=main.__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("machine", type=int)
    parser.add_argument("ip_config", type=Path)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--clear", action="store_true")
    options = parser.parse_args()
    try:
        if options.clear:
            count = clear(addresses(options.ip_config, Store(options.store).machines)[options.machine])
            print(f"{count} files removed from {SHARED}")
        else:
            serve(options.store, options.machine, options.ip_config, options.replicas)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
