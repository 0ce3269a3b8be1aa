"""`distegnn launch` from the hosts' names to the last line."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..commands.train import report_result
from ..config import Config
from ..data.store_inputs import DEFAULT_INPUTS, check_settings
from ..errors import Failure
from ..utils import signals
from ..utils.console import print_table
from . import host_checks
from .agent_client import PING_EVERY_S, Link
from .copy_store import dispatch as copy_store
from .hostfile import Host
from .supervisor import Job, Launch
from .workers import Crew, say

GREETING_S = 30.0
OPEN = (
    "warning: DistDGL's and gloo's traffic is neither encrypted nor authenticated: whoever reaches these addresses can read and "
    "change it. Use a private network."
)


@contextmanager
def connected(hosts: list[Host], patience: float) -> Iterator[tuple[list[Link], queue.Queue[Any]]]:
    """An agent on every host; they end, and all that they started, when the block does. Raises Failure naming all that fail."""
    events: queue.Queue[Any] = queue.Queue()
    links: list[Link] = []
    try:
        links += [Link(host, events, patience) for host in hosts]
        missing = []
        for link in links:
            try:
                link.greet(GREETING_S)
            except Failure as failure:
                missing.append(str(failure))
        _refuse(missing)
        yield links, events
    finally:
        for link in links:
            link.close()


def _refuse(problems: list[str]) -> None:
    """Raise Failure for the last problem, after a line for each one before."""
    for line in problems[:-1]:
        say(f"error: {line}")
    if problems:
        raise Failure(problems[-1])


def prepare(links: list[Link], config: Config, resume: bool, port: int, max_restarts: int) -> Job:
    """Look at every host and make the job. Raises Failure after a line for each problem."""
    asked = [link.send("look", store=config.data.path, run=config.run.dir) for link in links]
    seen = [link.answer(one) for link, one in zip(links, asked, strict=True)]
    hosts = [link.host for link in links]
    _refuse(host_checks.problems(hosts, seen, config, resume))
    places = [host_checks.address(host, here) for host, here in zip(hosts, seen, strict=True)]
    addresses = [ip for _, ip in places]
    for number, ip in enumerate(addresses):
        if ip in addresses[:number]:
            raise Failure(
                f"host {hosts[number].name}: has the address of {hosts[addresses.index(ip)].name}, {ip}; DistDGL tells machines "
                "apart by their addresses: name each machine once, or other interfaces"
            )
    store = seen[0]["store"]
    check_settings(DEFAULT_INPUTS | store["inputs"], config.data.path, config.data)
    interfaces = [name for name, _ in places]
    return Job(config, addresses, interfaces, store["trainers"], store["sizes"], resume, port, max_restarts)


def _span(first: int, count: int) -> str:
    return f"{first}" if count == 1 else f"{first} to {first + count - 1}"


def show(job: Job, links: list[Link]) -> None:
    """The plan: who does what, and by which commands."""
    config, ranks = job.config, job.ranks()
    each, group = job.trainers * config.train.replicas, job.trainers * len(links)
    rows = [
        [
            link.host.name,
            job.interfaces[m],
            f"{job.addresses[m]}:{job.port or '(free)'}",
            ", ".join(_span(first, job.trainers) for first in range(m * job.trainers, len(ranks), group)),
            f"{job.sizes[m] / 1e6:.1f} MB",
        ]
        for m, link in enumerate(links)
    ]
    print_table(
        f"{config.data.path}: servers {len(links)}, trainers {len(ranks)}",
        ["host", "interface", "server", "ranks", "partition"],
        rows,
    )
    print(
        f"rendezvous: {job.addresses[0]}:{job.port + 1 if job.port else '(free)'}; run: {config.run.dir} on {links[0].host.name}"
    )
    train = config.train
    print(
        f"a process waits {train.timeout_s:g} s for the others, a checkpoint is due every {train.checkpoint_minutes:g} minutes,"
    )
    print(f"after a failure there are up to {job.max_restarts} restarts from the last one")
    for machine, link in enumerate(links):
        served = f"{config.data.path} {machine} IP_CONFIG --replicas={config.train.replicas}"
        print(f"on {link.host.name}: {link.host.python} -P -m dist_egnn.data.graph_server {served}")
        print(f"{' ' * len(link.host.name)}     {each} × {link.host.python} -P -m dist_egnn.launch.trainer_main")


def run(
    config: Config,
    hosts: list[Host],
    *,
    resume: bool = False,
    port: int = 0,
    max_restarts: int = 3,
    dry_run: bool = False,
    dispatch: bool = False,
) -> dict[str, float]:
    """Check all hosts, then train on them; what rank 0 returned. Raises Failure, or Stopped after a checkpoint."""
    if not config.data.path:
        raise Failure("data.path is not set: name a store made with `distegnn partition --shard-nodes 0`")
    config.data.path = str(Path(config.data.path).absolute())
    if dispatch and not dry_run:
        copy_store(Path(config.data.path), hosts)
    with connected(hosts, max(config.train.timeout_s, 3 * PING_EVERY_S)) as (links, events):
        job = prepare(links, config, resume, port, max_restarts)
        show(job, links)
        crew = Crew(links, events, signals.stop_requested)
        if dry_run:
            Launch(job, crew).rehearse()
            print("every host has the versions, the store, the room and the ports, and reaches every other one")
            return {}
        if any(name != "lo" for name in job.interfaces):
            say(OPEN)
        with signals.catch_stop_signals():
            try:
                last = Launch(job, crew).supervise()
            finally:
                crew.stop(servers=False)
                crew.stop(servers=True, within=5)
    report_result(Path(config.run.dir), last or {"stopped": 1.0}, len(job.ranks()), "launch")
    return last
