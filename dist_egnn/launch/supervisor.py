"""Run the servers and trainers of a launch, and restart them from the last checkpoint when one of them fails."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from .. import config as configs
from ..config import Config
from ..errors import Failure
from ..utils import progress
from .agent_client import AgentClient, HostLost
from .workers import SERVER, WorkerFailure, Workers, announce

# seconds that a server may take until it is ready: for imports, and for its partition at this rate
IMPORTS_S, LOADED_BYTES_S = 60.0, 2e7
CONNECT_S = 5.0


@dataclass(frozen=True)
class Job:
    """What a launch runs. addresses, interfaces, sizes: of each host; sizes: bytes of its partition.

    trainers: on each host, for each of `train.replicas` groups. port: of the servers, the next ones are for the
    rendezvous; 0: free ports.
    """

    config: Config
    addresses: list[str]
    interfaces: list[str]
    trainers: int
    sizes: list[int]
    resume: bool
    port: int
    max_restarts: int

    def ranks(self) -> list[int]:
        """The machine of each rank: group after group, in each group machine after machine."""
        group = [machine for machine in range(len(self.addresses)) for _ in range(self.trainers)]
        return group * self.config.train.replicas


class HostUnreachable(Failure):
    """A host cannot connect to another one."""


class Supervisor:
    """Runs a job on its hosts."""

    def __init__(self, job: Job, workers: Workers) -> None:
        self.job, self.workers = job, workers
        self.server_ports: list[int] = []  # of the running servers
        self.rehearsals = 0

    def run(self) -> dict[str, float]:
        """Train, with restarts, and return the result of rank 0 ({}: stopped before it had one).

        Raises Failure with the last cause once there are no restarts left.
        """
        job, workers = self.job, self.workers
        for attempt in range(job.max_restarts + 1):
            try:
                server_ports, rendezvous_port = self._connect_hosts(attempt)
                ip_configs = self._start_servers(server_ports)
                resume = job.resume or (attempt > 0 and self._has_checkpoint())
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
                    self._stop_servers()
                if workers.stop_requested():
                    raise Failure(f"{cause} while it was being stopped; the last checkpoint is kept") from failure
                if attempt < job.max_restarts:
                    announce(cause)
        workers.print_recent_lines()
        raise Failure(
            f"{cause}; gave up after {job.max_restarts} restarts. Once this is fixed: "
            f"distegnn launch --resume {job.config.run.dir}"
        )

    def _stop_servers(self) -> None:
        self.workers.stop(servers=True)
        self.server_ports = []

    def _connect_hosts(self, attempt: int) -> tuple[list[int], int]:
        """Check that every host answers and reaches all others; on a restart, wait `train.timeout_s` for them.

        Returns the ports of the servers, and the port of the rendezvous.
        """
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
                if not isinstance(failure, HostLost | HostUnreachable) or time.monotonic() > end:
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
        if self.server_ports:  # the server of this host is gone
            self._stop_servers()

    def rehearse(self) -> tuple[list[int], int]:
        """Listen on all ports, let every host connect to every host, and free the ports again."""
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
                    raise HostUnreachable(
                        f"host {client.host.name}: does not reach {', '.join(missed)}; check the network, and the "
                        "firewalls of the hosts"
                    )
        finally:
            for client in clients:
                client.send("close")
        return self.server_ports or [ports[0] for ports in taken], taken[0][1]

    def _has_checkpoint(self) -> bool:
        """Whether the run's folder, on the first host, holds a checkpoint."""
        config = self.job.config
        return bool(self.workers.clients[0].call("inspect", store=config.data.path, run=config.run.dir)["has_run"])

    def _start(self, machine: int, name: str, module: str, *words: str, text: str = "", shared: str = "") -> None:
        python = self.workers.clients[machine].host.python
        self.workers.start(machine, name, [python, "-P", "-m", f"dist_egnn.{module}", *words], text, shared)

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
            shared = f"dist_egnn~{job.addresses[machine]}~{ports[machine]}~"
            self._start(machine, SERVER, "data.graph_server", *words, shared=shared)
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
        for rank, machine in enumerate(job.ranks()):
            task = {
                "rank": rank,
                "group": attempt,
                "ip_config": ip_configs[machine],
                "address": job.addresses[0],
                "port": port,
                "interface": job.interfaces[machine],
                "resume": resume,
                "config": configs.to_yaml(job.config),
            }
            self._start(machine, f"trainer {rank}", "launch.trainer_main", text=json.dumps(task))
        result: dict[str, float] = {}
        tick: Callable[..., None] | None = None
        with ExitStack() as stack:
            for _, line in workers.lines(servers=False):
                if not line.startswith(progress.EVENT_PREFIX):
                    continue
                message = json.loads(line.removeprefix(progress.EVENT_PREFIX))
                result = message.get("result", result)
                if message.get("title") != "training":
                    continue
                if tick is None:
                    tick = stack.enter_context(
                        progress.progress_bar("training", message["total"], initial=message["initial"])
                    )
                tick(message["note"], completed=message["done"])
        if not result and not workers.stopping:
            raise WorkerFailure("the trainers ended without a result", servers=False)
        return result
