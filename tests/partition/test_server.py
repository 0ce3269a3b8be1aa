"""DGL's own graph server and client load a store. This file is also the script of both processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import GUARD_S, free_ports

from dist_egnn.data.store import Store

SHARED = Path("/dev/shm")


def role(kind: str, ip_config: str, result: str) -> None:
    import dgl
    import torch

    # returns in the client only; tensorpipe: a server that lost its client idles instead of spinning
    dgl.distributed.initialize(ip_config, net_type="tensorpipe")
    assert kind == "client"
    graph = dgl.distributed.DistGraph("dist_egnn")
    nodes = torch.arange(0, graph.num_nodes(), 7).flip(0)
    src, dst = graph.find_edges(torch.arange(graph.num_edges()))
    pulled = {name: graph.ndata[name][nodes].numpy() for name in graph.ndata}
    np.savez(result, nodes=nodes, src=src, dst=dst, num_nodes=graph.num_nodes(), **pulled)
    dgl.distributed.exit_client()


def shared_files() -> set[Path]:
    """Files of DGL's server in /dev/shm: graph, partition book, node fields. graph_server.py's: dist_egnn~…"""
    return {f for pattern in ("dist_egnn[!~]*", "dist_egnn", "node~_N~*-kvdata-") for f in SHARED.glob(pattern)}


@pytest.fixture
def alone() -> Iterator[None]:
    """One such server per machine: DGL names its files in /dev/shm after the fields alone."""
    with open("/tmp/dist_egnn-test-server.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.servers
@pytest.mark.skipif(not SHARED.is_dir(), reason="DGL's servers share graphs through /dev/shm")
def test_dgl_serves_a_store(make_store: Callable[..., Path], alone: None, tmp_path: Path) -> None:
    path = make_store(1, shard_nodes=0)
    ip_config, result, log = tmp_path / "ip.txt", tmp_path / "pulled.npz", tmp_path / "log"
    ip_config.write_text(f"127.0.0.1 {free_ports(1)[0]}\n")
    dgl = {"DIST_MODE": "distributed", "IP_CONFIG": ip_config, "CONF_PATH": path / "shard-00000" / "dist_egnn.json"}
    dgl |= {"GRAPH_FORMAT": "coo,csc", "SERVER_ID": 0, "NUM_SERVER": 1, "NUM_CLIENT": 1, "NUM_SAMPLER": 0}
    environment = {f"DGL_{name}": str(value) for name, value in {**dgl, "DIST_MAX_TRY_TIMES": 600}.items()}
    before, running = shared_files(), []
    until = time.monotonic() + GUARD_S
    try:
        for kind in ("server", "client"):
            command = [sys.executable, __file__, kind, str(ip_config), str(result)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", **environment, "DGL_ROLE": kind}
            env["PYTHONPATH"] = str(Path(__file__).parents[1])
            with log.open("a") as out:
                running.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL))
        codes = [process.wait(max(until - time.monotonic(), 0.1)) for process in reversed(running)]
        assert codes == [0, 0], log.read_text()
        left = shared_files() - before
    finally:
        for process in running:
            process.kill()
            process.wait()
        for file in shared_files() - before:
            file.unlink()
    assert not left

    pulled = np.load(result)
    store = Store(path)
    graphs = [store.read(k, 0) for k in range(len(store.snapshots))]
    assert pulled["num_nodes"] == sum(g.num_nodes() for g in graphs)
    for name in ("x", "v", "f", "a", "y", "gid"):
        whole = np.concatenate([g.ndata[name] for g in graphs])
        np.testing.assert_array_equal(pulled[name], whole[pulled["nodes"]])
    snapshot = np.repeat(np.arange(len(graphs)), [g.num_nodes() for g in graphs])
    np.testing.assert_array_equal(pulled["snapshot"], snapshot[pulled["nodes"]])
    starts = np.cumsum([0, *(g.num_nodes() for g in graphs)])
    for k, name in enumerate(("src", "dst")):
        edges = [g.edges(order="eid")[k].numpy() + start for g, start in zip(graphs, starts, strict=False)]
        np.testing.assert_array_equal(pulled[name], np.concatenate(edges))


if __name__ == "__main__":
    role(*sys.argv[1:])
