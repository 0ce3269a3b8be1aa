"""A trainer of `distegnn launch`: reads its task as JSON from standard input and prints its result as a marked line."""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .. import config as configs
from ..config import Config
from ..data import graph_server, identity
from ..distributed.comm import join_hosts
from ..errors import Failure
from ..evaluate import selection
from ..train import checkpoint, run_dir, trainer
from ..utils import console, filesystem, progress, signals


def train(config: Config, resume: bool, peers: dict[str, Any]) -> dict[str, float]:
    """Connect to the servers and the other trainers, and train. Rank 0 locks and checks the folder of the run."""
    check = checkpoint.check_resume if resume else run_dir.check_new_run
    if config.train.select == "rollout":
        config.train.select_data = selection.trajectories_file(config)
    with ExitStack() as stack:
        if peers["rank"] == 0:
            check(config)
            busy = "another run is at work there; wait for it, or choose another run.dir"
            stack.enter_context(filesystem.lock_folder(Path(config.run.dir), busy))
            check(config)  # again, now that no other process can start a run there
        try:
            path, timeout_s, rank = Path(config.data.path), config.train.timeout_s, peers["rank"]
            ip_config, replicas = Path(peers["ip_config"]), config.train.replicas
            size = graph_server.connect(path, rank, ip_config, peers["group"], timeout_s, replicas)
            comm = join_hosts(rank, size, peers["address"], peers["port"], peers["interface"], timeout_s)
        except Failure as failure:  # a restart may find the missing servers or trainers
            raise ConnectionError(str(failure)) from failure
        if comm.size == 1:  # with several processes, `trainer.train` handles the signals
            stack.enter_context(signals.catch_stop_signals())
        return trainer.train(comm, config, resume, identity.of_data(path), selection.rollout_error)


def main() -> None:
    """Exit codes: 0 done, or stopped on request; 2 an error that a restart cannot fix; 1 any other error."""
    console.guard_streams()
    task = json.load(sys.stdin)
    try:
        result = train(configs.parse(task["config"], "the launcher's config"), task["resume"], task["peers"])
        if task["peers"]["rank"] == 0:
            print(f"\n{progress.EVENT_PREFIX}{json.dumps({'result': result})}", flush=True)
        code = 0
    except (Failure, ConnectionError) as failure:
        print(f"error: {failure}", flush=True)
        code = 2 if isinstance(failure, Failure) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    graph_server.leave(code)  # without DGL's exit handlers, which wait for peers that may be gone


if __name__ == "__main__":
    main()
