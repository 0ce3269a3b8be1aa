"""One trainer of a launch: its job comes as JSON on standard input, what the launcher shall know goes out on marked lines."""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .. import config as configs
from ..config import Config
from ..data import graph_server
from ..errors import Failure
from ..train import resume, run_dir, trainer
from ..utils import filesystem, progress, signals


class Unmet(Exception):
    """Servers or trainers that did not come: the next try may find them."""


def work(job: dict[str, Any], config: Config) -> dict[str, float]:
    """Meet the others and train. Rank 0 holds the run's folder, and refuses one that it must not write to."""
    folder = Path(config.run.dir)
    check = resume.check_resume if job["resume"] else run_dir.check_new_run
    with ExitStack() as stack:
        if job["rank"] == 0:
            check(config)
            stack.enter_context(
                filesystem.lock_folder(folder, "another run is at work there; wait for it, or choose another run.dir")
            )
            check(config)  # now that nobody else begins one
        try:
            comm = graph_server.enter(
                Path(config.data.path),
                job["rank"],
                Path(job["ip_config"]),
                job["group"],
                job["address"],
                job["port"],
                job["interface"],
                config.train.timeout_s,
                config.train.replicas,
            )
        except Failure as failure:
            raise Unmet(str(failure)) from failure
        if comm.size == 1:  # where there are several, each listens in train()
            stack.enter_context(signals.catch_stop_signals())
        return trainer.train(comm, config, job["resume"])


def main() -> None:
    """Exit codes: 0 done or stopped as asked; 2 something that a restart does not mend; 1 anything else."""
    job = json.load(sys.stdin)
    try:
        result = work(job, configs.parse(job["config"], "the launcher's config"))
        if job["rank"] == 0:
            print(f"\n{progress.EVENT_PREFIX}{json.dumps({'result': result})}", flush=True)
        code = 0
    except (Failure, Unmet) as failure:
        print(f"error: {failure}", flush=True)
        code = 2 if isinstance(failure, Failure) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    graph_server.leave(code)  # not through DGL's exit handlers, which wait for peers that may be gone


if __name__ == "__main__":
    main()
