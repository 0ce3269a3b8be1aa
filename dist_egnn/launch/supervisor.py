"""The attempts of a launch: hosts that meet, servers, trainers; and again from the last checkpoint when one of them is lost."""

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
from .agent_client import Link, Lost
from .workers import SERVER, Broken, Crew, say

READY_S, LOADED_BYTES_S = 60.0, 2e7  # what a server may take to be ready: imports, and its partition at that rate


@dataclass(frozen=True)
class Job:
    """What is to be run: trainers of each group on each machine, whose address and interface are given in the hosts' order.

    sizes: bytes of each machine's partition; port: of the servers, those after it for the rendezvous; 0: free ones.
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
        """The machine of each rank: group after group of `train.replicas`, in each machine after machine."""
        group = [machine for machine in range(len(self.addresses)) for _ in range(self.trainers)]
        return group * self.config.train.replicas


class Unreached(Failure):
    """A host does not reach another one."""


class Launch:
    """A job on its hosts."""

    def __init__(self, job: Job, crew: Crew) -> None:
        self.job, self.crew = job, crew
        self.ports: list[int] = []  # of the servers that run
        self.meetings = 0

    def supervise(self) -> dict[str, float]:
        """Try until it is done; what rank 0 returned ({}: stopped before it could). Raises Failure with the last cause."""
        job, crew = self.job, self.crew
        for attempt in range(job.max_restarts + 1):
            try:
                server_ports, rendezvous = self._meet(attempt)
                ip_config = self._serve(server_ports)
                resume = job.resume or (attempt > 0 and self._begun())
                if attempt:
                    say(
                        f"restart {attempt} of {job.max_restarts}, from {'the last checkpoint' if resume else 'the beginning'}"
                    )
                return self._train(attempt, rendezvous, ip_config, resume)
            except (Broken, Lost) as broken:
                if attempt == 0 and not crew.said:  # nothing has been started yet
                    raise
                cause = str(broken)
                crew.stop(servers=False)
                if isinstance(broken, Lost) or broken.servers:
                    crew.stop(servers=True)
                    self.ports = []
                if crew.asked():
                    raise Failure(f"{cause}, while it was being stopped; the last checkpoint stays") from broken
                if attempt < job.max_restarts:
                    say(f"{cause}")
        crew.last_words()
        raise Failure(
            f"{cause}; given up after {job.max_restarts} restarts. Once it is mended: "
            f"distegnn launch --resume {job.config.run.dir}"
        )

    # the hosts

    def _meet(self, attempt: int) -> tuple[list[int], int]:
        """Every host answers and every two reach each other; on a restart they have `train.timeout_s` for it.

        Returns the servers' ports, and the one of the rendezvous.
        """
        until = time.monotonic() + (self.job.config.train.timeout_s if attempt else 0)
        while True:
            try:
                for machine, link in enumerate(self.crew.links):
                    if not link.alive:
                        self._reconnect(machine)
                return self.rehearse()
            except (Lost, Unreached) as problem:
                if not attempt:
                    raise
                if time.monotonic() > until:
                    raise Broken(str(problem)) from problem
            except Failure as failure:
                if not attempt:
                    raise
                raise Broken(str(failure)) from failure
            time.sleep(1)

    def _reconnect(self, machine: int) -> None:
        """Another agent on a host whose first one is gone."""
        link = self.crew.links[machine]
        # one that is only cut off ends itself, and what it started, after that time: not two beside each other
        alone = 2.0 if link.process.poll() is not None else link.heard + link.patience + 2 - time.monotonic()
        time.sleep(max(alone, 0.0))
        link.close()
        self.crew.forget(machine)
        self.crew.links[machine] = fresh = Link(link.host, self.crew.events, link.patience)
        fresh.greet(20)
        if self.ports:  # its server is gone
            self.crew.stop(servers=True)
            self.ports = []

    def rehearse(self) -> tuple[list[int], int]:
        """Take the ports, let everybody connect to everybody, and free the ports again."""
        job, links = self.job, self.crew.links
        wanted = [[0 if self.ports else job.port] for _ in links]
        wanted[0].append(job.port + 1 + self.meetings if job.port else 0)
        self.meetings += 1
        try:
            pairs = zip(links, job.addresses, wanted, strict=True)
            asked = [link.send("listen", address=address, ports=ports) for link, address, ports in pairs]
            taken = [link.answer(one)["ports"] for link, one in zip(links, asked, strict=True)]
            targets = [(address, ports[0]) for address, ports in zip(job.addresses, taken, strict=True)]
            asked = [link.send("reach", targets=targets, limit=5.0) for link in links]
            for link, one in zip(links, asked, strict=True):
                if missed := link.answer(one, 5.0 * len(links) + 5):
                    raise Unreached(
                        f"host {link.host.name}: does not reach {', '.join(missed)}; check the network, and that no firewall "
                        "stands between the hosts"
                    )
        finally:
            for link in links:
                link.send("close")
        return self.ports or [ports[0] for ports in taken], taken[0][1]

    def _begun(self) -> bool:
        """Whether the run's folder, on the first host, holds a checkpoint to go on from."""
        config = self.job.config
        return bool(self.crew.links[0].ask("look", store=config.data.path, run=config.run.dir)["begun"])

    # the processes

    def _argv(self, machine: int, module: str, *words: str) -> list[str]:
        return [self.crew.links[machine].host.python, "-P", "-m", module, *words]

    def _serve(self, ports: list[int]) -> list[str]:
        """Start the servers, unless they run, and wait until all are ready; on each host, the file that names them."""
        job, crew = self.job, self.crew
        text = "".join(f"{address} {port}\n" for address, port in zip(job.addresses, ports, strict=True))
        named = [link.ask("write", name="ip_config.txt", content=text) for link in crew.links]
        if self.ports:
            return named
        self.ports = ports
        for machine, path in enumerate(named):
            replicas = f"--replicas={job.config.train.replicas}"
            argv = self._argv(
                machine, "dist_egnn.data.graph_server", job.config.data.path, str(machine), path, replicas
            )
            crew.start(machine, SERVER, argv, shared=f"dist_egnn~{job.addresses[machine]}~{ports[machine]}~")
        waiting = set(range(len(named)))
        for machine, line in crew.lines(servers=True, limit=READY_S + max(job.sizes) / LOADED_BYTES_S):
            if line.startswith(f"distegnn server {machine} ready"):
                waiting.discard(machine)
            if not waiting:
                return named
        raise Broken("the servers were stopped")

    def _train(self, attempt: int, rendezvous: int, ip_config: list[str], resume: bool) -> dict[str, float]:
        """Start the trainers and listen to them until they end."""
        job, crew = self.job, self.crew
        for rank, machine in enumerate(job.ranks()):
            task = {
                "rank": rank,
                "group": attempt,
                "ip_config": ip_config[machine],
                "address": job.addresses[0],
                "port": rendezvous,
                "interface": job.interfaces[machine],
                "resume": resume,
                "config": configs.to_yaml(job.config),
            }
            crew.start(
                machine, f"trainer {rank}", self._argv(machine, "dist_egnn.launch.trainer_main"), json.dumps(task)
            )
        result: dict[str, float] = {}
        tick: Callable[..., None] | None = None
        with ExitStack() as stack:
            for _, line in crew.lines(servers=False):
                if not line.startswith(progress.EVENT_PREFIX):
                    continue
                told = json.loads(line.removeprefix(progress.EVENT_PREFIX))
                result = told.get("result", result)
                if told.get("title") != "training":
                    continue
                if tick is None:
                    tick = stack.enter_context(
                        progress.progress_bar("training", told["total"], initial=told["initial"])
                    )
                tick(told["note"], completed=told["done"])
        if not result and not crew.told:
            raise Broken("the trainers ended without a word", servers=False)
        return result
