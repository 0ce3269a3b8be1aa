"""Check, before anything starts, that hosts have the same versions, the right store, and enough memory."""

from __future__ import annotations

from typing import Any

from ..config import Config
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
    problems = [f"host {host.name}: {line}" for host, info in pairs for line in _version_problems(info, path)]
    if problems:
        return problems
    problems = [
        f"host {host.name}: {path} is another store there than on {hosts[0].name} (manifest.yaml differs); "
        "copy the same store to both, or use --dispatch"
        for host, info in pairs
        if info["store"]["sha256"] != store["sha256"]
    ]
    problems += _layout_problems(hosts, store, path)
    if problems:
        return problems
    for number, (host, info) in enumerate(pairs):
        problems += [f"host {host.name}: {line}" for line in _memory_problems(info, store, number, config)]
    where = f"host {hosts[0].name}: {config.run.dir}"
    if resume and not infos[0]["has_run"]:
        problems.append(f"{where} holds no run to resume; list the host that has the run first")
    if infos[0]["has_run"] and not resume:
        remedy = f"choose another run.dir, or: distegnn launch --resume {config.run.dir}"
        problems.append(f"{where} holds a run already; {remedy}")
    return problems


def _version_problems(info: dict[str, Any], path: str) -> list[str]:
    """Differences between a host and the launcher in versions and code; and whether the host has the store."""
    problems = [
        f"has {name} {info['versions'].get(name, 'missing')}, the launcher {version}; install the same on all hosts"
        for name, version in host_info.package_versions().items()
        if info["versions"].get(name) != version
    ]
    if not problems and info["code"] != host_info.source_hash():
        problems.append("has other code of dist_egnn, of the same version; check out the same commit on all hosts")
    if info["store"] is None:
        problems.append(f"has no whole store {path}; copy it there, or use --dispatch")
    return problems


def _layout_problems(hosts: list[Host], store: dict[str, Any], path: str) -> list[str]:
    """Whether the store was made for this number of hosts and of trainers."""
    machines, trainers = store["machines"], store["trainers"]
    listed = {host.trainers for host in hosts if host.trainers is not None}
    if len(listed) > 1:
        return ["the hosts have different numbers of trainers; a store has the same number for each machine"]
    fits = machines == len(hosts) and listed <= {trainers}
    if fits and store["shards"] == 1:
        return []
    made_for = (
        f"{store['shards']} graphs, and servers take one" if fits else f"{machines} machines × {trainers} trainers"
    )
    count = next(iter(listed), trainers)
    option = f"--trainers {count} " if listed or count > 1 else ""
    return [f"{path}: made for {made_for}; partition again with --parts {len(hosts)} {option}--shard-nodes 0"]


def _memory_problems(info: dict[str, Any], store: dict[str, Any], number: int, config: Config) -> list[str]:
    """Whether a host has the shared memory and the memory for its server and its trainers."""
    trainers, problems = store["trainers"], []
    nodes, edges, halo = store["sums"][number]
    shared = memory.graph_server_bytes(nodes, edges, halo, store["floats"], trainers)
    if shared > info["shared"]:
        problems.append(
            f"its server takes about {shared / 1e9:.2f} GB of /dev/shm, {info['shared'] / 1e9:.2f} GB are free there; "
            "make it larger (mount -o remount,size=…, docker --shm-size), or partition for more machines"
        )
    needed = SERVER_BYTES + store["sizes"][number] + shared
    for nodes, edges in store["largest"][number * trainers : (number + 1) * trainers]:
        needed += config.train.replicas * preflight.training_bytes(config, nodes, edges)
    if needed > info["memory"]:
        problems.append(
            f"server and trainers take about {needed / 1e9:.1f} GB, {info['memory'] / 1e9:.1f} GB are free; "
            "partition for more machines, or lower model.hidden or model.layers"
        )
    return problems


def choose_interface(host: Host, info: dict[str, Any]) -> tuple[str, str]:
    """(interface, IPv4 address) that the other hosts connect to. Raises Failure unless there is exactly one choice."""
    addresses: dict[str, str] = info["addresses"]
    shown = ", ".join(f"{name} ({ip})" for name, ip in addresses.items()) or "none"
    if host.interface is not None:
        if host.interface not in addresses:
            raise Failure(f"host {host.name}: has no interface {host.interface} with an IPv4 address; it has {shown}")
        return host.interface, addresses[host.interface]
    outward = [name for name, ip in addresses.items() if not ip.startswith("127.")]
    if len(outward) != 1:
        raise Failure(f"host {host.name}: set interface=NAME in its line of the hosts file; it has {shown}")
    return outward[0], addresses[outward[0]]
