"""`distegnn plan`: estimate memory, communication and time of a training run, and print them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from ..config import Config
from ..data import dataset
from ..errors import Failure
from ..planning import plan as planning
from ..planning.plan import Plan
from ..utils import part_weights
from ..utils.console import print_line, print_table


def run_plan(config: Config, as_json: bool = False, measure: bool = False) -> None:
    """Run a trial of every rank and print what the run will take. measure: also speeds, and weights that balance them."""
    if measure and dataset.part_count(config) == 1:
        raise Failure("--measure: weights are for several processes; name them, for example partition.parts=2")
    plan = planning.make_plan(config, lambda line: print(line, file=sys.stderr, flush=True))
    snapshots = ", ".join(f"{n} {split}" for split, n in plan.snapshots.items())
    title = f"{plan.data}: {snapshots} snapshots, {plan.parts} process{'es' * (plan.parts > 1)} on {plan.cores:g} cores"
    rows = []
    for r in plan.ranks:
        counts = [f"{count:,.0f}" for count in (r.nodes, r.edges, r.cut, r.halo)]
        rows.append([r.rank, *counts, f"{r.sent_bytes / 1e6:.3f}", f"{r.peak_gb:.2f}", f"{r.alone_s:.3f}"])
    cut = "cross" if plan.halo == "exchange" else "cut"
    print_table(title, ["rank", "nodes", "edges", cut, "halo", "sent [MB]", "memory [GB]", "alone [s]"], rows)
    _print_summary(plan)
    if measure:
        title = "speed of each process's device, in edges + 4 nodes a second of processor time"
        print_table(title, ["rank", "speed"], [[rank.rank, f"{rank.speed:,.0f}"] for rank in plan.ranks])
        if plan.weights is None:
            print_line("all alike: no weights are needed (partition.weights=null)")
        else:
            busy = " (of a busy machine: measure again when it is quiet)" if plan.busy < 0.9 else ""
            print_line(f"all are done at once with partition.weights={part_weights.to_text(plan.weights)}{busy}")
    if as_json:
        print(json.dumps(asdict(plan)))


def _print_summary(plan: Plan) -> None:
    if plan.machines > 1:
        each = f"{plan.parts // plan.machines} of the {plan.parts} processes"
        print_line(
            f"the store is for {plan.machines} machines, not for this one alone: `distegnn launch` starts {each}"
        )
        print_line("on each; estimates are for machines like this one, with calls that do not cross a network")
    where = "on a machine" if plan.machines > 1 else "in all"
    print_line(f"memory: {plan.memory_gb:.2f} GB {where}, {plan.free_gb:.1f} GB are free")
    sums = "a step's sums and exchanges" if plan.halo == "exchange" else "a step's sums"
    print_line(
        f"{sums}: {plan.calls} calls, up to {plan.payload_bytes:,.0f} bytes from a process, "
        f"{plan.wire_bytes:,.0f} on the wire, {plan.exchange_s:.4f} s"
    )
    if plan.partition_s:
        print_line(f"partition: {plan.partition_s:.1f} s, once")
    total = plan.first_epoch_s + (plan.epochs - 1) * plan.epoch_s
    hours = f" ({total / 3600:.1f} hours)" if total > 3600 else ""
    print_line(
        f"step: {plan.step_s:.3f} s; epoch of {plan.steps} steps and validation: {plan.epoch_s:.2f} s, the first "
        f"{plan.first_epoch_s:.2f} s; {plan.epochs} epochs: {total:.0f} s{hours}"
    )
    if plan.busy < 0.9:
        idle = f"with nothing else to do a step takes {plan.idle_step_s:.3f} s, an epoch {plan.idle_epoch_s:.2f} s"
        print_line(f"the machine is busy: the trial had {plan.busy:.0%} of a core; {idle}")
    if plan.memory_gb > plan.free_gb:
        remedy = "lower model.hidden, model.layers or train.batch_size"
        print_line(f"the {plan.parts} processes together need more memory than is free: {remedy}")
