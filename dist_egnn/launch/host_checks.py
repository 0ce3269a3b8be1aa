"""What hosts must have in common and have room for, before anything is started on them."""

from __future__ import annotations

from typing import Any

from ..config import Config
from ..errors import Failure
from ..train import preflight
from ..utils import memory
from . import host_info
from .hostfile import Host

SERVER_BYTES = 0.4e9  # a server without its graph: the libraries


def problems(hosts: list[Host], seen: list[dict[str, Any]], config: Config, resume: bool) -> list[str]:
    """Everything that stands against the launch, a line each that names the host and the remedy."""
    found = []
    for host, here in zip(hosts, seen, strict=True):
        found += [f"host {host.name}: {line}" for line in _differences(here, config)]
    if found:
        return found
    stores = [here["store"] for here in seen]
    for host, store in zip(hosts, stores, strict=True):
        if store["sha256"] != stores[0]["sha256"]:
            found.append(
                f"host {host.name}: its {config.data.path} is another store than that of {hosts[0].name} (manifest.yaml differs); "
                "copy the right one there, or let --dispatch do it"
            )
    found += _layout(hosts, stores[0], config.data.path)
    if found:
        return found
    for number, (host, here) in enumerate(zip(hosts, seen, strict=True)):
        found += [f"host {host.name}: {line}" for line in _room(here, stores[0], number, config)]
    if seen[0]["begun"] != resume:
        found.append(_run(hosts[0], config, resume))
    return found


def _differences(here: dict[str, Any], config: Config) -> list[str]:
    """Versions and code of a host against the launcher's own; and whether it has the store at all."""
    mine = host_info.versions()
    found = [
        f"has {name} {here['versions'].get(name, 'missing')}, the launcher {version}; install the same on all hosts"
        for name, version in mine.items()
        if here["versions"].get(name) != version
    ]
    if not found and here["code"] != host_info.code():
        found.append("has other code of dist_egnn, of the same version number; bring all hosts to one commit")
    if here["store"] is None:
        found.append(f"has no whole store {config.data.path}; copy it there, or let --dispatch do it")
    return found


def _layout(hosts: list[Host], store: dict[str, Any], path: str) -> list[str]:
    """Whether the store is made for these hosts."""
    machines, trainers = store["machines"], store["trainers"]
    wanted = {host.trainers for host in hosts if host.trainers is not None}
    fits = machines == len(hosts) and wanted <= {trainers}
    if fits and store["shards"] == 1:
        return []
    each = f"--trainers {max(wanted)} " if wanted else f"--trainers {trainers} " if trainers > 1 else ""
    if len(wanted) > 1:
        return ["the hosts name different numbers of trainers; a store has the same number for each machine"]
    has = (
        f"{machines} machines with {trainers} trainers each"
        if fits is False
        else f"{store['shards']} graphs, and servers take one"
    )
    return [f"{path}: made for {has}; partition again with --parts {len(hosts)} {each}--shard-nodes 0"]


def _room(here: dict[str, Any], store: dict[str, Any], number: int, config: Config) -> list[str]:
    """Whether a host has the shared memory and the memory for its server and its trainers."""
    nodes, edges, halo = store["sums"][number]
    shared = memory.graph_server_bytes(nodes, edges, halo, store["floats"], store["trainers"])
    found = []
    if shared > here["shared"]:
        found.append(
            f"its server takes about {shared / 1e9:.2f} GB of /dev/shm, {here['shared'] / 1e9:.2f} GB are free there; make it "
            "larger (mount -o remount,size=…, docker --shm-size), or partition for more machines"
        )
    ranks = range(number * store["trainers"], (number + 1) * store["trainers"])
    needed = SERVER_BYTES + store["sizes"][number] + shared
    for rank in ranks:
        needed += config.train.replicas * preflight.training_bytes(config, *store["largest"][rank])
    if needed > here["memory"]:
        found.append(
            f"server and trainers take about {needed / 1e9:.1f} GB, {here['memory'] / 1e9:.1f} GB are free; partition for more "
            "machines, or lower model.hidden or model.layers"
        )
    return found


def _run(host: Host, config: Config, resume: bool) -> str:
    folder = config.run.dir
    if resume:
        return f"host {host.name}: {folder} holds no run to go on with; the first host keeps it: is this the right one?"
    return (
        f"host {host.name}: {folder} holds a run already; choose another run.dir, or: distegnn launch --resume {folder}"
    )


def address(host: Host, here: dict[str, Any]) -> tuple[str, str]:
    """(interface, IPv4 address) by which the other hosts reach this one. Raises Failure where that is not plain."""
    there: dict[str, str] = here["addresses"]
    shown = ", ".join(f"{name} ({ip})" for name, ip in there.items()) or "none"
    if host.interface is not None:
        if host.interface not in there:
            raise Failure(f"host {host.name}: has no interface {host.interface} with an IPv4 address; it has {shown}")
        return host.interface, there[host.interface]
    outward = [name for name, ip in there.items() if not ip.startswith("127.")]
    if len(outward) != 1:
        raise Failure(f"host {host.name}: name the interface to use, as interface=NAME in its line; it has {shown}")
    return outward[0], there[outward[0]]
