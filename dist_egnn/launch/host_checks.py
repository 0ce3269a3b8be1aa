"""Check, before anything starts, that hosts have the same versions, the right store, and enough memory."""

from __future__ import annotations

from typing import Any

from ..config import Config
from ..data.store_inputs import another
from ..errors import Failure
from ..train import preflight
from ..utils import memory
from . import host_info
from .hostfile import Host

SERVER_BYTES = 0.4e9  # memory of a server without its graph: the libraries


def find_problems(hosts: list[Host], infos: list[dict[str, Any]], config: Config, resume: bool) -> list[str]:
    """All that prevents the launch: one line per problem, with the host and the remedy. infos: by `inspect_host`."""
    path, store = config.data.path, infos[0]["store"]
    pairs = list(zip(hosts, infos, strict=True))
    versions, code = host_info.package_versions(), host_info.source_hash()
    problems = []
    for host, info in pairs:
        there = info["versions"]
        different = sorted(versions.items() - there.items())
        lines = [f"has {k} {there.get(k)}, the launcher {v}; install the same on all hosts" for k, v in different]
        if not lines and info["code"] != code:
            lines.append("has other code of dist_egnn, of the same version; check out the same commit on all hosts")
        if info["store"] is None:
            lines.append(f"has no whole store {path}; copy it there, or use --dispatch")
        problems += [f"host {host.name}: {line}" for line in lines]
    if problems:
        return problems
    other = f"{path} is another store there than on {hosts[0].name} (manifest.yaml differs); copy it, or use --dispatch"
    problems = [f"host {host.name}: {other}" for host, info in pairs if info["store"]["sha256"] != store["sha256"]]
    problems += layout_problems(hosts, store, path)
    if problems:
        return problems
    for number, (host, info) in enumerate(pairs):
        problems += [f"host {host.name}: {line}" for line in _memory_problems(info, store, number, config)]
    folder = config.run.dir
    where = f"host {hosts[0].name}: {folder}"
    if resume and not infos[0]["has_run"]:
        problems.append(f"{where} holds no run to resume; list the host that has the run first")
    if infos[0]["has_run"] and not resume:
        problems.append(f"{where} holds a run already; set another run.dir, or: distegnn launch --resume {folder}")
    return problems


def layout_problems(hosts: list[Host], store: dict[str, Any], path: str) -> list[str]:
    """Whether the store was made for this number of hosts and of trainers."""
    machines, trainers = store["machines"], store["trainers"]
    listed = {host.trainers for host in hosts if host.trainers is not None}
    if len(listed) > 1:
        return ["the hosts have different numbers of trainers; a store has the same number for each machine"]
    fits = machines == len(hosts) and listed <= {trainers}
    if fits and store["shards"] == 1:
        return []
    made_for = f"{machines} machines × {trainers} trainers"
    if fits:
        made_for = f"{store['shards']} graphs, and servers take one"
    count = next(iter(listed), trainers)
    changes = {"parts": len(hosts), "trainers": count, "shard_nodes": 0} | ({} if fits else {"weights": None})
    return [f"{path}: made for {made_for}; {another(path, store['inputs'], **changes)}"]


def _memory_problems(info: dict[str, Any], store: dict[str, Any], number: int, config: Config) -> list[str]:
    """Whether a host has the shared memory and the memory for its server and its trainers."""
    trainers = store["trainers"]
    nodes, edges, halo = store["sums"][number]
    shared = memory.graph_server_bytes(nodes, edges, halo, store["floats"], trainers)
    needed = SERVER_BYTES + store["sizes"][number] + shared
    for nodes, edges in store["largest"][number * trainers : (number + 1) * trainers]:
        needed += config.train.replicas * preflight.training_bytes(config, nodes, edges)
    enlarge = "make /dev/shm larger (mount -o remount,size=…, docker --shm-size)"
    checks = [
        ("its server takes", shared, "/dev/shm", info["shared"], enlarge),
        ("server and trainers take", needed, "memory", info["memory"], "lower model.hidden or model.layers"),
    ]
    return [
        f"{what} about {size / 1e9:.2f} GB of {kind}, {free / 1e9:.2f} GB are free; {remedy}, or use more machines"
        for what, size, kind, free, remedy in checks
        if size > free
    ]


def choose_interface(host: Host, info: dict[str, Any]) -> tuple[str, str]:
    """(interface, IPv4 address) that the other hosts connect to. Raises Failure unless there is exactly one choice."""
    addresses: dict[str, str] = info["addresses"]
    names = [host.interface] if host.interface else [x for x, ip in addresses.items() if not ip.startswith("127.")]
    if len(names) != 1 or names[0] not in addresses:
        problem = f"has no interface {names[0]} with an IPv4 address" if host.interface else "the interface is unclear"
        shown = ", ".join(f"{name} ({ip})" for name, ip in addresses.items()) or "none"
        raise Failure(f"host {host.name}: {problem}; set interface=NAME in the hosts file; it has {shown}")
    return names[0], addresses[names[0]]
