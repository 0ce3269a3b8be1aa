"""What the commands of `distegnn` do to stores and runs, with what they print; for the command line, recipes and sweeps."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import Failure
from ..utils.console import print_line, print_table


def make_store(file: Any, out: Path, inputs: Any) -> None:
    """Write a store with a progress display and say what it holds."""
    from ..data.store import Store
    from ..partition import store_writer
    from ..utils.progress import bar

    started = time.perf_counter()
    with bar("partitioning", len(store_writer.listing(file, inputs))) as tick:
        fresh = store_writer.write(file, out, inputs, lambda done, _all: tick(to=done))
    store = Store(out)
    if not fresh:
        print(f"{out}: complete already, nothing to do")
    found = store.summary()
    print_table(
        f"{out}: {len(store.snapshots)} snapshots in {store.parts} parts, {time.perf_counter() - started:.1f} s",
        ["method", "edges cut", "largest/mean", "halo/nodes"],
        [[store.inputs["method"], f"{found['edge_cut']:.1%}", f"{found['balance']:.3f}", f"{found['halo']:.1%}"]],
    )


def to_partition(config: Any) -> tuple[Any, Any]:
    """A config's trajectories file, and the inputs of its store. Raises Failure for what cannot be partitioned."""
    from ..data.trajectories import Trajectories
    from ..partition import store_writer

    file = Trajectories(config.data.path)
    inputs = store_writer.inputs_of(
        file,
        parts=config.partition.parts,
        weights=config.partition.weights,
        method=config.partition.method,
        method_seed=config.partition.seed,
        settings=config.data,
        shard_nodes=store_writer.SHARD_NODES,
    )
    store_writer.check(file, inputs)
    return file, inputs


def run_partition(config: Any, out: Path, given: tuple[Any, Any] | None = None) -> None:
    """Write the store of a config's trajectories file, or go on with it, and set data.path to it; given: `to_partition`'s."""
    file, inputs = given or to_partition(config)
    make_store(file, out, inputs)
    config.data.path = str(out.absolute())


def run_verification(path: Path, config: Any, snapshot: int | None = None) -> None:
    """Check a store and, with a config, its model's exactness over partitions; prints what was found."""
    from ..data.store import Store
    from ..partition.verify import verify as check
    from ..utils.progress import bar

    store = Store(path)
    if snapshot is None:
        snapshot = len(store.snapshots) // 2  # the first may be more symmetric than most: a weaker test
    if not 0 <= snapshot < len(store.snapshots):
        raise Failure(f"--snapshot {snapshot}: {path} has snapshots 0 to {len(store.snapshots) - 1}")
    with bar("verifying", len(store.snapshots)) as tick:
        counted = check(store, lambda done, _all: tick(to=done))
    print(f"{path}: whole: " + ", ".join(f"{n:,} {what}" for what, n in counted.items()))
    if config is None:
        return
    from ..evaluate import parallel_check

    with tempfile.TemporaryDirectory(prefix="dist_egnn-") as folder:
        found = parallel_check.compare(config, store, snapshot, Path(folder))
    graph = "full graph" if config.partition.halo == "exchange" else "same cut graph"
    gradients = {k: v for k, v in found.items() if k.startswith("gradient")}
    worst = max(gradients, key=lambda k: gradients[k])
    rows = [[k, f"{v:.1e}"] for k, v in found.items() if k not in gradients]
    print_table(
        f"{store.parts} processes against one on the {graph}, float64, snapshot {snapshot}",
        ["compared", "largest relative error"],
        [*rows, [f"{len(gradients)} gradients, worst {worst.removeprefix('gradient ')}", f"{gradients[worst]:.1e}"]],
    )
    # not `max(…) > …`: what is NaN is wrong too
    wrong = [k for k, v in found.items() if not v <= parallel_check.TOLERANCE]
    if wrong:
        raise Failure(
            f"{path}: {wrong[0]} differs by {found[wrong[0]]:.1e}, more than "
            f"{parallel_check.TOLERANCE:.0e}: P processes do not compute what one does; please report this"
        )


def run_training(config: Any, resume: bool = False) -> dict[str, float]:
    """Partition if need be, train on `samples.processes`, and say where the results are.

    resume: go on with the run in run.dir. Raises Stopped, after a checkpoint, if a signal asks this process to stop.
    """
    from ..data import dataset
    from ..distributed import spawn
    from ..models import network
    from ..ops import activation_offload
    from ..planning import plan
    from ..train import resume as resuming
    from ..train import trainer as training
    from ..utils import filesystem, signals

    network.named(config.model.name)
    training.device_of(config)
    folder = Path(config.run.dir)
    if config.data.path:
        config.data.path = str(Path(config.data.path).absolute())  # the run is evaluated from anywhere
    check = resuming.check_resumed if resume else resuming.check_fresh
    check(config)  # before there is a folder
    parts, processes = dataset.part_count(config), dataset.process_count(config)
    activation_offload.check(config.train.kept, "train.kept=")
    plan.check_memory(config, parts)
    cut = to_partition(config) if parts > 1 and not dataset.is_store(config.data.path) else None
    with filesystem.hold(folder, "another run is at work there; wait for it, or choose another run.dir"):
        if not resume:
            check(config)  # now that nobody else begins one
        if cut is not None:
            run_partition(config, folder / (f"store-{parts}" if resume else "store"), cut)
        with signals.listening():
            last = spawn.run(training.train, processes, config, resume, timeout_s=config.train.timeout_s)[0]
    tell_end(folder, last, processes, "train")
    return last


def tell_end(folder: Path, last: dict[str, float], processes: int, command: str) -> None:
    """The last line of a training. Raises Stopped, and says how to go on, if it was asked to stop."""
    from ..utils import signals

    if "stopped" in last:
        where = f" in epoch {last['epoch']:g} after step {last['step']:g}" if "epoch" in last else ""
        print(f"{folder}: stopped{where}; go on: distegnn {command} --resume {folder}", file=sys.stderr)
        raise signals.Stopped
    on = "1 process" if processes == 1 else f"{processes} processes"
    if "step_s" in last:
        print(f"{folder}: best validation MSE {last['best_valid_mse']:.4e}, {last['step_s']:.3f} s a step on {on}")
    else:
        print(f"{folder}: best validation MSE {last['best_valid_mse']:.4e}; done before, train.epochs=N adds to it")


def run_import(file: Path, config: Any) -> None:
    """Make a run of published FastEGNN weights: its config.yaml and best.pt, which `dist_egnn.load` and evaluation take.

    config: data as the weights were trained on, model.normalize and model.gravity; the rest of the model is what the weights say.
    Raises Failure for a file that is not such weights, or does not fit the config.
    """
    from dataclasses import replace

    from .. import config as configs
    from ..distributed.comm import Alone
    from ..models import network, published_weights
    from ..train import checkpoint
    from ..train import trainer as training

    folder, data, wanted = Path(config.run.dir), config.data, config.model
    if (folder / "config.yaml").exists():
        raise Failure(f"{folder}: holds a run already; choose another --out")
    if wanted.tanh:
        raise Failure("model.tanh=true: not with published weights, whose code bounds other networks too; leave it out")
    state = published_weights.read(file)
    try:
        model = network.FastEGNN.from_published(state, normalize=wanted.normalize, gravity=wanted.gravity)
    except Failure as failure:
        raise Failure(f"{file}: {failure}") from failure
    widths = model.widths
    if widths["e"] != 2:
        raise Failure(f"{file}: made for {widths['e']} edge attributes; samples here carry 2, the edge's length twice")
    for key, names, width in (("features", data.features, "f"), ("node_attributes", data.node_attributes, "a")):
        if names is not None and len(names) != widths[width]:
            raise Failure(
                f"data.{key}=[{', '.join(names)}]: {len(names)}, but the weights of {file} take {widths[width]}; "
                "name as many, in their order"
            )
    sizes = {"hidden": model.hidden, "layers": len(model.layers), "virtual_nodes": model.count}
    attention = any("attention" in name for name in model.state_dict())
    config.model = replace(wanted, name="FastEGNN", attention=attention, **sizes)
    if data.path:
        data.path = str(Path(data.path).absolute())  # the run is evaluated from anywhere
    made: dict[str, Any] = {"model": model.state_dict(), "config": configs.to_yaml(config)}
    # what the config builds must take the weights
    checkpoint.load_weights(training.build_model(config, (widths["f"], widths["a"]), Alone()), made, file)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / "best.pt", made)
    (folder / "config.yaml").write_text(made["config"])
    shown = {**sizes, "features": widths["f"], "node_attributes": widths["a"], "attention": attention}
    print_table(f"{folder}: FastEGNN of {file}", ["option", "found"], [[k, v] for k, v in shown.items()])


def resumed_config(run: Path, overrides: Sequence[str]) -> Any:
    """A run's own config, but for the overrides, to go on with it."""
    from .. import config as configs
    from ..train import resume as resuming

    resuming.check_run(run)
    given = {word.partition("=")[0] for word in overrides}
    if "data.path" in given and "partition.parts" not in given:  # a store's parts decide
        overrides = ["partition.parts=0", *overrides]
    if given & {"data.path", "partition.parts"} and "partition.weights" not in given:  # they were the old parts'
        overrides = ["partition.weights=null", *overrides]
    config = configs.load(run / "config.yaml", overrides)
    if "run.dir" in given:
        raise Failure(f"override 'run.dir': a resume goes on in {run}; copy the folder to go on elsewhere")
    config.run.dir = str(run)
    return config


def resume_training(run: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Go on with a run under its own config, but for the overrides."""
    return run_training(resumed_config(run, overrides), resume=True)


def run_evaluation(run: Path, split: str = "test") -> dict[str, float]:
    """Errors of a run's best checkpoint by name, on as many processes as it was trained on; also in evaluate.csv."""
    import pandas as pd

    from .. import config as configs
    from ..data import dataset
    from ..data.trajectories import SPLITS
    from ..distributed import spawn
    from ..train import resume as resuming
    from ..train import trainer as training

    if split not in SPLITS:
        raise Failure(f"--split {split}: use one of {', '.join(SPLITS)}")
    resuming.check_run(run)
    config = configs.load(run / "config.yaml")
    config.run.dir = str(run)
    try:
        training.device_of(config)
    except Failure as failure:  # nothing on this command line sets it: the run's file does
        raise Failure(f"{run / 'config.yaml'}: {failure}") from failure
    size = dataset.process_count(config)
    found = spawn.run(training.evaluate, size, config, run / "best.pt", split, timeout_s=config.train.timeout_s)[0]
    table, path = (
        pd.DataFrame([{"split": split, "prediction": k, "mse": v} for k, v in found.items()]),
        run / "evaluate.csv",
    )
    if path.is_file():
        before = pd.read_csv(path)
        table = pd.concat([before[before["split"] != split], table])
    try:
        table.to_csv(path, index=False)
    except OSError as error:  # a run that may only be read can be evaluated all the same
        print(f"warning: {path}: not written ({error.strerror})", file=sys.stderr)
    return found


def run_plan(config: Any, as_json: bool = False, measure: bool = False) -> None:
    """Try every rank of a config's run and print what the run will take; measure: also speeds, and weights from them."""
    import json
    import sys

    from ..data import dataset
    from ..planning import plan

    if measure and dataset.part_count(config) == 1:
        raise Failure("--measure: weights are for several processes; name them, for example partition.parts=2")
    found = plan.make(config, lambda line: print(line, file=sys.stderr, flush=True))
    rows = [
        [
            r.rank,
            f"{r.nodes:,.0f}",
            f"{r.edges:,.0f}",
            f"{r.cut:,.0f}",
            f"{r.halo:,.0f}",
            f"{r.sent_bytes / 1e6:.3f}",
            f"{r.peak_gb:.2f}",
            f"{r.alone_s:.3f}",
        ]
        for r in found.ranks
    ]
    counted = ", ".join(f"{n} {split}" for split, n in found.snapshots.items())
    cut = "cross" if found.halo == "exchange" else "cut"
    header = ["rank", "nodes", "edges", cut, "halo", "sent [MB]", "memory [GB]", "alone [s]"]
    print_table(
        f"{found.data}: {counted} snapshots, {found.parts} process{'es' * (found.parts > 1)} on {found.cores:g} cores",
        header,
        rows,
    )
    print_line(f"memory: {found.memory_gb:.2f} GB in all, {found.free_gb:.1f} GB are free")
    print_line(
        f"a step's sums{' and exchanges' * (found.halo == 'exchange')}: {found.calls} calls, up to {found.payload_bytes:,.0f} "
        f"bytes from a process, {found.wire_bytes:,.0f} on the wire, {found.exchange_s:.4f} s"
    )
    if found.partition_s:
        print_line(f"partition: {found.partition_s:.1f} s, once")
    total = found.first_epoch_s + (found.epochs - 1) * found.epoch_s
    print_line(
        f"step: {found.step_s:.3f} s; epoch of {found.steps} steps and validation: {found.epoch_s:.2f} s, the first "
        f"{found.first_epoch_s:.2f} s; {found.epochs} epochs: {total:.0f} s"
        + (f" ({total / 3600:.1f} hours)" if total > 3600 else "")
    )
    if found.busy < 0.9:
        print_line(
            f"the machine is busy: the trial had {found.busy:.0%} of a core; with nothing else to do a step takes "
            f"{found.idle_step_s:.3f} s, an epoch {found.idle_epoch_s:.2f} s"
        )
    if found.memory_gb > found.free_gb:
        print_line(
            f"the {found.parts} processes together need more memory than is free: lower model.hidden, model.layers or "
            "train.batch_size"
        )
    if measure:
        _tell_weights(found)
    if as_json:
        print(json.dumps(found.plain()))


def _tell_weights(found: Any) -> None:
    """Speeds of a plan's ranks, and the weights that go with them, ready to paste."""
    from ..utils import part_weights

    print_table(
        "speed of each process's device, in edges + 4 nodes a second of processor time",
        ["rank", "speed"],
        [[rank.rank, f"{rank.speed:,.0f}"] for rank in found.ranks],
    )
    if found.weights is None:
        print_line("all alike: no weights are needed (partition.weights=null)")
    else:
        print_line(
            f"all are done at once with partition.weights={part_weights.text(found.weights)}"
            + (" (of a busy machine: measure again when it is quiet)" if found.busy < 0.9 else "")
        )


def run_doctor(as_json: bool = False) -> bool:
    """Examine machine and installation and print what was found; whether there is no problem."""
    import json

    from ..planning import doctor

    found = doctor.examine()
    signs = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
    for one in found:
        print_line(f"{signs[one.state]} {one.check}: {one.text}", 8)
        if one.remedy:
            print_line(f"        → {one.remedy}", 10)
    problems = sum(one.state == "problem" for one in found)
    print("all well" if not problems else f"{problems} problem{'s' * (problems > 1)}")
    if as_json:
        print(json.dumps(doctor.plain(found)))
    return not problems
