"""`distegnn launch`: check all hosts, print the plan, and train."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..commands.train import report_result
from ..config import Config
from ..data.dgl_compat import check_servers
from ..data.store_inputs import DEFAULT_INPUTS, check_settings
from ..errors import Failure
from ..utils import signals
from ..utils.console import print_table
from . import host_checks, host_info
from .agent_client import PING_EVERY_S, AgentClient, Events
from .copy_store import copy_store
from .hostfile import Host
from .supervisor import Job, Supervisor
from .workers import Workers, announce

GREETING_S = 30.0
WARNING = "warning: the traffic between hosts is neither encrypted nor authenticated; use a private network"


@contextmanager
def connect_agents(hosts: list[Host], patience: float) -> Iterator[list[AgentClient]]:
    """Start an agent on every host; each ends, with all that it started, when the block ends. Raises Failure."""
    events: Events = queue.Queue()
    clients: list[AgentClient] = []
    errors: list[str] = []
    try:
        for host in hosts:
            clients.append(AgentClient(host, events, patience))
        for client in clients:
            try:
                client.wait_for_greeting(GREETING_S)
            except Failure as failure:
                errors.append(str(failure))
        _raise_errors(errors)
        yield clients
    finally:
        for client in clients:
            client.close()


def _raise_errors(errors: list[str]) -> None:
    """Print all errors but the last, and raise Failure for that one."""
    for error in errors[:-1]:
        announce(f"error: {error}")
    if errors:
        raise Failure(errors[-1])


def make_job(clients: list[AgentClient], config: Config, resume: bool, port: int, max_restarts: int) -> Job:
    """Inspect every host and make the job. Raises Failure, after a line for each problem."""
    answers = [client.send("inspect", store=config.data.path, run=config.run.dir) for client in clients]
    infos = [client.result(answer) for client, answer in zip(clients, answers, strict=True)]
    hosts = [client.host for client in clients]
    _raise_errors(host_checks.find_problems(hosts, infos, config, resume))
    chosen = [host_checks.choose_interface(host, info) for host, info in zip(hosts, infos, strict=True)]
    interfaces, addresses = ([pair[k] for pair in chosen] for k in (0, 1))
    for number, address in enumerate(addresses):
        if address in addresses[:number]:
            problem = f"{hosts[number].name}: has the address {address} of {hosts[addresses.index(address)].name}"
            raise Failure(f"host {problem}; name each machine once, or set interface=NAME")
    store = infos[0]["store"]
    check_settings(DEFAULT_INPUTS | store["inputs"], config.data.path, config.data)
    return Job(config, addresses, interfaces, store["trainers"], store["sizes"], resume, port, max_restarts)


def show_plan(config: Config, hosts: list[Host], *, resume: bool, port: int, max_restarts: int) -> None:
    """Print the plan of a launch from the list of hosts and the store that lies here, without reaching a host."""
    path = Path(config.data.path)
    if (store := host_info.summarize_store(path)) is None:
        raise Failure(f"data.path={path}: no whole store here; make one with `distegnn partition --shard-nodes 0`")
    _raise_errors(host_checks.layout_problems(hosts, store, str(path)))
    check_settings(DEFAULT_INPUTS | store["inputs"], str(path), config.data)
    names, interfaces = [host.name for host in hosts], [host.interface or "(its own)" for host in hosts]
    job = Job(config, names, interfaces, store["trainers"], store["sizes"], resume, port, max_restarts)
    print_plan(job, hosts)
    print("no host was reached; --dry-run also checks each of them")


def print_plan(job: Job, hosts: list[Host]) -> None:
    """Print which host runs which processes, and by which commands."""
    train, store, ranks, step = job.config.train, job.config.data.path, job.ranks(), job.trainers
    rows = []
    for machine, host in enumerate(hosts):
        first = range(machine * step, len(ranks), step * len(hosts))
        shown = ", ".join(f"{rank} to {rank + step - 1}" if step > 1 else str(rank) for rank in first)
        server = f"{job.addresses[machine]}:{job.port or '(free)'}"
        rows.append([host.name, job.interfaces[machine], server, shown, f"{job.sizes[machine] / 1e6:.1f} MB"])
    title = f"{store}: servers {len(hosts)}, trainers {len(ranks)}"
    print_table(title, ["host", "interface", "server", "ranks", "partition"], rows)
    rendezvous = f"{job.addresses[0]}:{job.port + 1 if job.port else '(free)'}"
    print(f"rendezvous: {rendezvous}; run: {job.config.run.dir} on {hosts[0].name}")
    print(f"a process waits {train.timeout_s:g} s for others; a checkpoint every {train.checkpoint_minutes:g} minutes;")
    print(f"after a failure up to {job.max_restarts} restarts from the last checkpoint")
    for machine, host in enumerate(hosts):
        name, python = host.name, f"{host.python} -P -m dist_egnn."
        print(f"on {name}: {python}data.graph_server {store} {machine} IP_CONFIG --replicas={train.replicas}")
        print(f"{' ' * len(name)}     {job.trainers * train.replicas} × {python}launch.trainer_main")


def run(
    config: Config,
    hosts: list[Host],
    *,
    resume: bool,
    port: int,
    max_restarts: int,
    plan: bool,
    dry_run: bool,
    dispatch: bool,
) -> dict[str, float]:
    """Check all hosts, train, and return the result of rank 0. Raises Failure, or Stopped after a checkpoint.

    plan: only `show_plan`; dry_run: only check.
    """
    if not config.data.path:
        raise Failure("data.path is not set: name a store made with `distegnn partition --shard-nodes 0`")
    config.data.path = str(Path(config.data.path).absolute())
    for name in ("select_data", "init"):
        value = getattr(config.train, name)
        setattr(config.train, name, value and str(Path(value).absolute()))
    if plan:
        show_plan(config, hosts, resume=resume, port=port, max_restarts=max_restarts)
        return {}
    check_servers()
    if dispatch and not dry_run:
        copy_store(Path(config.data.path), hosts)
    with connect_agents(hosts, max(config.train.timeout_s, 3 * PING_EVERY_S)) as clients:
        job = make_job(clients, config, resume, port, max_restarts)
        print_plan(job, hosts)
        workers = Workers(clients)
        supervisor = Supervisor(job, workers)
        if dry_run:
            supervisor.rehearse()
            print("every host has the versions, the store, the memory and the ports, and reaches every other host")
            return {}
        if any(name != "lo" for name in job.interfaces):
            announce(WARNING)
        with signals.catch_stop_signals():
            try:
                result = supervisor.run()
            finally:
                workers.stop(servers=False)
                workers.stop(servers=True, within=5)
                supervisor.clear_lost_hosts()
    report_result(Path(config.run.dir), result or {"stopped": 1.0}, len(job.ranks()), "launch")
    return result
