"""`distegnn train`: train a model, or resume a run. Imports torch in the functions only: the launcher does without."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import Config
from ..errors import Failure
from ..utils import filesystem, signals


def run_training(config: Config, resume: bool = False) -> dict[str, float]:
    """Partition the data if needed, train, one process per part and replica, and print where the results are.

    resume: continue the run in run.dir. Raises Stopped, after a checkpoint, on SIGTERM, SIGHUP or Ctrl-C.
    """
    from ..data import dataset, identity
    from ..distributed import spawn
    from ..models import network
    from ..ops import activation_offload
    from ..partition import store_writer
    from ..train import callbacks, checkpoint, initial_weights, preflight, run_dir, trainer
    from .partition import run_partition, store_inputs

    network.model_class(config.model.name)
    config.train.init = config.train.init and str(Path(config.train.init).absolute())
    callbacks.load(config.train.callbacks)
    if not resume:
        initial_weights.check(config)
    folder = Path(config.run.dir)
    config.data.path = config.data.path and str(Path(config.data.path).absolute())  # the run is evaluated from anywhere
    check = checkpoint.check_resume if resume else run_dir.check_new_run
    check(config)  # before the folder is made
    rollout_error = None
    if config.train.select == "rollout":  # before a partition replaces data.path
        from ..evaluate import selection

        config.train.select_data, rollout_error = selection.trajectories_file(config), selection.rollout_error
    parts, processes = dataset.part_count(config), dataset.process_count(config)
    trainer.resolve_device(config, processes=processes)
    activation_offload.check_folder(config.train.kept, "train.kept=")
    preflight.check_training(config, parts)
    opened = store_inputs(config) if parts > 1 and not dataset.is_store(config.data.path) else None
    if opened:
        store_writer.check_inputs(*opened)
    with filesystem.lock_folder(folder, "another run is at work there; wait for it, or choose another run.dir"):
        if not resume:
            check(config)  # again, now that no other process can start a run there
        if opened:
            run_partition(config, folder / (f"store-{parts}" if resume else "store"), opened)
        about = identity.of_data(config.data.path)
        with signals.catch_stop_signals():
            given = config, resume, about, rollout_error
            result = spawn.run_ranks(trainer.train, processes, *given, timeout_s=config.train.timeout_s)[0]
    report_result(folder, result, processes, "train")
    return result


def report_result(folder: Path, result: Mapping[str, float], processes: int, command: str) -> None:
    """Print the last line of a training. Raises Stopped, after printing how to resume, if the training was stopped."""
    if "stopped" in result:
        where = f" in epoch {result['epoch']:g} after step {result['step']:g}" if "epoch" in result else ""
        print(f"{folder}: stopped{where}; go on: distegnn {command} --resume {folder}", file=sys.stderr)
        raise signals.Stopped(signals.EXIT_STOPPED)
    time = "; all epochs were done before; for more, set train.epochs to a larger total"
    if "step_s" in result:
        time = f", {result['step_s']:.3f} s a step on {processes} process{'es' * (processes > 1)}"
    of, best = next((name, value) for name, value in result.items() if name.startswith("best_valid"))
    print(f"{folder}: best validation MSE {'of rollouts ' * ('rollout' in of)}{best:.4e}{time}")


def resumed_config(run: Path, overrides: Sequence[str]) -> Config:
    """The config to resume a run with: its own, changed by the overrides."""
    from ..train import run_dir

    given = {override.partition("=")[0] for override in overrides}
    reset = ["partition.parts=0"] if "data.path" in given else []  # the number of parts follows from the store
    reset += ["partition.weights=null"] if given & {"data.path", "partition.parts"} else []  # those of the old parts
    config = run_dir.load_config(run, [*reset, *overrides])
    if "run.dir" in given:
        raise Failure(f"override 'run.dir': --resume continues in {run}; copy that folder to continue elsewhere")
    return config
