"""Run the servers and trainers of a launch, and restart them from the last checkpoint when one of them fails."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from .. import config as configs
from ..config import Config
from ..errors import Failure
from ..utils import progress, signals
from .agent_client import AgentClient, HostLost
from .workers import SERVER, WorkerFailure, Workers, announce

# seconds that a server may take until it is ready: for imports, and for its partition at this rate
IMPORTS_S, LOADED_BYTES_S = 60.0, 2e7
CONNECT_S = 5.0


@dataclass(frozen=True)
class Job:
    """What a launch runs."""

    config: Config
    addresses: list[str]  # of each host
    interfaces: list[str]  # of each host
    trainers: int  # on each host, in each of `train.replicas` groups
    sizes: list[int]  # bytes of each host's partition
    resume: bool
    port: int  # of the servers; the next ones are for the rendezvous; 0: free ports
    max_restarts: int

    def ranks(self) -> list[int]:
        """The machine of each rank: group after group, in each group machine after machine."""
        group = [machine for machine in range(len(self.addresses)) for _ in range(self.trainers)]
        return group * self.config.train.replicas


class Supervisor:
    """Runs a job on its hosts."""

    def __init__(self, job: Job, workers: Workers) -> None:
        self.job, self.workers = job, workers
        self.server_ports: list[int] = []  # of the running servers
        self.rehearsals = 0

    def run(self) -> dict[str, float]:
        """Train and return rank 0's result ({}: stopped before). Raises Failure once there are no restarts left."""
        job, workers = self.job, self.workers
        folders = {"store": job.config.data.path, "run": job.config.run.dir}
        for attempt in range(job.max_restarts + 1):
            try:
                server_ports, rendezvous_port = self._connect_hosts(attempt)
                ip_configs = self._start_servers(server_ports)
                resume = job.resume or (attempt > 0 and workers.clients[0].call("inspect", **folders)["has_run"])
                if attempt:
                    source = "the last checkpoint" if resume else "the beginning"
                    announce(f"restart {attempt} of {job.max_restarts}, from {source}")
                return self._train(attempt, rendezvous_port, ip_configs, resume)
            except (WorkerFailure, HostLost) as failure:
                if attempt == 0 and not workers.recent:  # no process has been started yet
                    raise
                cause = str(failure)
                workers.stop(servers=False)
                if isinstance(failure, HostLost) or failure.servers:
                    workers.stop(servers=True)
                    self.server_ports = []
                if signals.stop_requested():
                    raise Failure(f"{cause} while it was being stopped; the last checkpoint is kept") from failure
                if attempt < job.max_restarts:
                    announce(cause)
        workers.print_recent_lines()
        remedy = f"once this is fixed: distegnn launch --resume {job.config.run.dir}"
        raise Failure(f"{cause}; gave up after {job.max_restarts} restarts; {remedy}")

    def _connect_hosts(self, attempt: int) -> tuple[list[int], int]:
        """`rehearse` with agents that are alive; on a restart, wait `train.timeout_s` for the hosts."""
        end = time.monotonic() + self.job.config.train.timeout_s
        while True:
            try:
                for machine, client in enumerate(self.workers.clients):
                    if not client.alive:
                        self._replace_agent(machine)
                return self.rehearse()
            except Failure as failure:
                if not attempt:
                    raise
                if not isinstance(failure, HostLost) or time.monotonic() > end:
                    raise WorkerFailure(str(failure)) from failure
            time.sleep(1)

    def _replace_agent(self, machine: int) -> None:
        """Start another agent on a host that lost its first one."""
        old = self.workers.clients[machine]
        # an agent that is only cut off ends, with its processes, after `patience`: the new one starts after that
        cut_off = old.process.poll() is None
        time.sleep(max(old.last_message + old.patience + 2 - time.monotonic(), 0.0) if cut_off else 2.0)
        old.close()
        self.workers.forget(machine)
        self.workers.clients[machine] = new = AgentClient(old.host, old.events, old.patience)
        new.wait_for_greeting(20)
        new.call("clear", folder=old.folder, shared=sorted(self.workers.shared.pop(machine, ())))
        self.workers.stop(servers=True)  # the one of this host is gone
        self.server_ports = []

    def clear_lost_hosts(self) -> None:
        """At the end: remove what killed agents left, on the hosts that can be reached."""
        for machine, client in enumerate(self.workers.clients):
            if not client.alive and client.process.poll() is not None:  # else it is cut off and ends by itself
                with suppress(Failure):
                    self._replace_agent(machine)

    def rehearse(self) -> tuple[list[int], int]:
        """Let every host connect to every host. Returns the free ports of the servers and that of the rendezvous."""
        job, clients = self.job, self.workers.clients
        ports = [[0 if self.server_ports else job.port] for _ in clients]
        ports[0].append(job.port + 1 + self.rehearsals if job.port else 0)
        self.rehearsals += 1
        try:
            hosts = zip(clients, job.addresses, ports, strict=True)
            answers = [client.send("listen", address=address, ports=listed) for client, address, listed in hosts]
            taken = [client.result(answer)["ports"] for client, answer in zip(clients, answers, strict=True)]
            targets = [(address, ports[0]) for address, ports in zip(job.addresses, taken, strict=True)]
            answers = [client.send("reach", targets=targets, limit=CONNECT_S) for client in clients]
            for client, answer in zip(clients, answers, strict=True):
                if missed := client.result(answer, CONNECT_S * len(clients) + 5):
                    problem = f"host {client.host.name}: does not reach {', '.join(missed)}"
                    raise HostLost(f"{problem}; check the network, and the firewalls of the hosts")
        finally:
            for client in clients:
                client.send("close")
        return self.server_ports or [ports[0] for ports in taken], taken[0][1]

    def _start_servers(self, ports: list[int]) -> list[str]:
        """Start the servers, unless they run, and wait until they are ready. Returns each host's file of addresses."""
        job, workers = self.job, self.workers
        text = "".join(f"{address} {port}\n" for address, port in zip(job.addresses, ports, strict=True))
        ip_configs = [client.call("write", name="ip_config.txt", content=text) for client in workers.clients]
        if self.server_ports:
            return ip_configs
        self.server_ports = ports
        for machine, path in enumerate(ip_configs):
            words = (job.config.data.path, str(machine), path, f"--replicas={job.config.train.replicas}")
            argv = workers.clients[machine].host.module("data.graph_server", *words)
            workers.start(machine, SERVER, argv, shared=f"dist_egnn~{job.addresses[machine]}~{ports[machine]}~")
        waiting = set(range(len(ip_configs)))
        for machine, line in workers.lines(servers=True, limit=IMPORTS_S + max(job.sizes) / LOADED_BYTES_S):
            if line.startswith(f"distegnn server {machine} ready"):
                waiting.discard(machine)
            if not waiting:
                return ip_configs
        raise WorkerFailure("the servers were stopped")

    def _train(self, attempt: int, port: int, ip_configs: list[str], resume: bool) -> dict[str, float]:
        """Start the trainers, show their progress until they end, and return the result of rank 0."""
        job, workers = self.job, self.workers
        task = {"config": configs.to_yaml(job.config), "resume": resume}
        peers = {"group": attempt, "address": job.addresses[0], "port": port}
        for rank, machine in enumerate(job.ranks()):
            own = {"rank": rank, "ip_config": ip_configs[machine], "interface": job.interfaces[machine]}
            argv = workers.clients[machine].host.module("launch.trainer_main")
            workers.start(machine, f"trainer {rank}", argv, text=json.dumps(task | {"peers": peers | own}))
        result: dict[str, float] = {}
        tick: Callable[..., None] | None = None
        with ExitStack() as stack:
            for _, line in workers.lines(servers=False):
                if not line.startswith(progress.EVENT_PREFIX):
                    continue
                message = json.loads(line.removeprefix(progress.EVENT_PREFIX))
                result = message.get("result", result)
                if message.get("title") == "training":
                    if tick is None:
                        bar = progress.progress_bar("training", message["total"], initial=message["initial"])
                        tick = stack.enter_context(bar)
                    tick(message["note"], completed=message["done"])
        if not result and not workers.stopping:
            raise WorkerFailure("the trainers ended without a result", servers=False)
        return result
