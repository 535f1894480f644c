"""Runs ablations with statistics: a grid of edits and settings times seeds, against the experiment as it is.

usage:
  python -m launch.sweep --experiment=NAME --workdir=DIR [--edit_grid=A,B,A+B] [--vary=PATH=V1,V2]... [--seeds=0,1,2]
                         [--at_once=N]

Every run is what launch.train makes, in a folder of its own below --workdir, one after the other. The same command
resumes, and skips what is finished. --edit and --set hold for all variants, the baseline too; a value of --vary or an
entry of --edit_grid makes a variant, and given both, all combinations are tried.

The answer (table.md, also printed; results.json; report/sweep.png) has a line a variant: mean and spread over the
seeds, its difference to the baseline paired by seed with a 95% interval, and whether that is better, worse or within
noise. --equal=steps compares after the same number of updates; --equal=flops shortens or lengthens each variant until
it costs what the baseline does.

--at_once=8 trains up to 8 runs in one program, for a small model leaves an accelerator mostly idle. In one program are
runs that differ in their seeds and in float settings of optimizer and objective (such as optimizer.lr) alone; others,
such as those of another width or optimizer, come in programs of their own. Several devices share the runs of a program,
each whole on one. Every run ends as it would alone, up to the order in which float sums are taken.

--dry_run shows the grid, its cost and what is finished. --print_commands prints the unfinished runs, one command a
line, for other machines that share --workdir; when they are done, the same sweep without it answers.

examples:
  python -m launch.sweep --experiment=pretrain_tiny --edit_grid=no_rope,muon,no_rope+muon --workdir=runs/rope
  python -m launch.sweep --experiment=pretrain_tiny --vary=optimizer.lr=1e-3,3e-3,1e-2 --seeds=0,1,2,3 --workdir=runs/lr
  python -m launch.sweep --experiment=pretrain_tiny --vary=optimizer.lr=1e-3,1e-2 --at_once=9 --workdir=runs/nine
  python -m launch.sweep --experiment=pretrain_tiny --edit_grid=half_depth_double_width --equal=flops --workdir=runs/w

Exit codes: 0 done (a diverged run is part of the answer); 2 bad definition or input; 42 a run was stopped and saved,
start the same command again.
"""

import dataclasses
import shlex
import signal
import subprocess
import sys
import time

from absl import flags

import experiments  # noqa: F401  (registers the definitions)
from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.data.prepare import tokenizer_for
from jaxlm.run import exits, replicas, sweep
from jaxlm.run.checkpoint import steps_saved
from jaxlm.run.experiment import Experiment
from jaxlm.run.train import inherit
from launch import common

EXPERIMENT = flags.DEFINE_string(
    "experiment", None, "Name of the definition; python -m launch.train --list shows them."
)
EDIT = flags.DEFINE_multi_string("edit", [], "Edit that every variant has, the baseline too; may be repeated.")
SET = flags.DEFINE_multi_string("set", [], "path=value that every variant has, the baseline too; may be repeated.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep; each run has a folder of its own below it.")
EDIT_GRID = flags.DEFINE_list("edit_grid", [], "Edits to try, each alone; a+b applies both. One variant an entry.")
VARY = flags.DEFINE_multi_string(
    "vary", [], "path=v1,v2,...: one variant a value; given several times, all combinations."
)
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every variant; differences are paired by seed.")
EQUAL = flags.DEFINE_enum("equal", "steps", ["steps", "flops"], "What the variants share: updates, or training FLOPs.")
METRIC = flags.DEFINE_string(
    "metric", None, "Decides; its value after the last update. Default: validation bits per byte."
)
LOWER_IS_BETTER = flags.DEFINE_bool("lower_is_better", True, "Direction of --metric.")
AT_ONCE = flags.DEFINE_integer("at_once", 1, "Runs that train in one program, at most.", 1)
PRINT_COMMANDS = flags.DEFINE_bool(
    "print_commands", False, "Print the commands of the unfinished runs, and run nothing."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the grid, its cost and what is finished, and run nothing.")


@dataclasses.dataclass(frozen=True)
class Job:
    variant: sweep.Variant
    seed: int
    experiment: Experiment
    workdir: str
    command: tuple[str, ...]


def resolve(variant: sweep.Variant) -> Experiment:
    try:
        return config.resolve(EXPERIMENT.value, [*EDIT.value, *variant.edits], [*SET.value, *variant.sets])
    except UserError as e:
        if variant.name == sweep.BASELINE:
            raise
        raise UserError(f"variant {variant.name}: {e}") from e


def jobs() -> tuple[list[Job], list[str]]:
    """Every run of the sweep, all variants with one seed and then with the next, and what the user should know."""
    resolved = {v: resolve(v) for v in sweep.grid(EDIT_GRID.value, VARY.value)}
    resolved, notes = sweep.drop_repeats(resolved)
    base = config.resolve(EXPERIMENT.value, EDIT.value)
    for v in resolved:
        edited = config.resolve(EXPERIMENT.value, [*EDIT.value, *v.edits])
        notes += sweep.undone(v, base, edited, SET.value)
    extra = {v: () for v in resolved}
    if EQUAL.value == "flops":
        baseline = next(iter(resolved))
        extra = {
            v: (f"train.steps={equal_steps(resolved[baseline], e)}",) for v, e in resolved.items() if v != baseline
        }
        extra[baseline] = ()
    out = []
    for seed in common.seeds(SEEDS.value):
        for v, e in resolved.items():
            sets = [*SET.value, *v.sets, *extra[v], f"seed={seed}"]
            workdir = str(storage.path(WORKDIR.value) / sweep.folder(v, seed))
            arguments = [f"--experiment={EXPERIMENT.value}", *(f"--edit={x}" for x in [*EDIT.value, *v.edits])]
            arguments += [*(f"--set={x}" for x in sets), f"--workdir={workdir}"]
            command = ("python", "-m", "launch.train", *arguments)
            out.append(Job(v, seed, config.parse_sets(e, [*extra[v], f"seed={seed}"]), workdir, command))
    return out, notes


def flops_per_step(e) -> float:
    e = inherit(e)
    return sweep.flops_per_step(e, e.model.vocab_size or tokenizer_for(e.data).vocab_size)


def equal_steps(baseline, e) -> int:
    return sweep.steps_at_equal_flops(baseline.train.steps, flops_per_step(baseline), flops_per_step(e))


def finished(job: Job) -> bool:
    if not (storage.path(job.workdir) / "config.json").exists():
        return False
    sweep.check_definition(job.workdir, inherit(job.experiment))
    diverged = exits.has_diverged(job.workdir)
    return diverged or sweep.final_metrics(job.workdir, job.experiment.train.steps) is not None


def programs(todo: list[Job]) -> tuple[list[list[Job]], list[str]]:
    """The jobs of each program, at most --at_once, and why there are several, in a line for each kind.

    What has begun goes on with what has a checkpoint of the same step, and never from the start.
    """
    found: list[list[Job]] = []
    notes: dict[str, str] = {}
    saved = {j.workdir: set(steps_saved(j.workdir)) for j in todo}
    for job in todo:
        for members in found:
            first = members[0]
            if why := replicas.obstacle(first.experiment, job.experiment):
                notes.setdefault(why, f"{job.variant.name} is not in one program with {first.variant.name}: {why}")
                continue
            steps = [saved[j.workdir] for j in (*members, job)]
            if len(members) < AT_ONCE.value and (set.intersection(*steps) or not any(steps)):
                members.append(job)
                break
        else:
            found.append([job])
    return found, list(notes.values())


def wait(process: subprocess.Popen) -> int:
    """The exit code of a run. SIGTERM is handed on; Ctrl-C reaches it by itself: it saves, then ends."""
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, previous)


def run(job: Job, label: str) -> int:
    """Runs one job in a process of its own, its output in `train.log` beside the run's metrics."""
    storage.make_dir(job.workdir)
    start, log = time.monotonic(), storage.path(job.workdir) / "train.log"
    print(f"{label} {job.variant.name}, seed {job.seed} ...", flush=True)
    with log.open("ab") as f:
        code = wait(subprocess.Popen([sys.executable, *job.command[1:]], stdout=f, stderr=f, stdin=subprocess.DEVNULL))
    if code == exits.EXIT_DIVERGED:
        exits.record_diverged(job.workdir)
        print(f"{label} diverged", flush=True)
    elif code not in (exits.EXIT_DONE, exits.EXIT_PREEMPTED):
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the run in {job.workdir} ended with exit code {code}: {last.removeprefix('error: ')}")
    else:
        print(f"{label} done in {time.monotonic() - start:.0f} s", flush=True)
    return code


def run_together(members: list[Job], label: str) -> int:
    """Trains jobs as one program, in this process."""
    names = ", ".join(f"{j.variant.name} seed {j.seed}" for j in members)
    start = time.monotonic()
    print(f"{label} {len(members)} runs: {names} ...", flush=True)
    base = config.resolve(EXPERIMENT.value)
    with exits.terminable():
        code = replicas.train_together({j.workdir: j.experiment for j in members}, base)
    diverged = sum(exits.has_diverged(j.workdir) for j in members)
    said = "stopped" if code == exits.EXIT_PREEMPTED else "done"
    print(f"{label} {said} in {time.monotonic() - start:.0f} s" + f", {diverged} diverged" * (diverged > 0), flush=True)
    return code


def answer(all_jobs: list[Job], notes: list[str]) -> None:
    """Reads every run's last metrics; writes and prints the comparison."""
    root = storage.path(WORKDIR.value)
    ends = {
        id(j): {} if exits.has_diverged(j.workdir) else sweep.final_metrics(j.workdir, j.experiment.train.steps)
        for j in all_jobs
    }
    metric = METRIC.value or sweep.choose_metric([end for end in ends.values() if end])
    values, costs = {}, {}
    for job in all_jobs:
        end, name = ends[id(job)], job.variant.name
        if end and metric not in end:
            raise UserError(f"{job.workdir} has no metric {metric!r}; {config.nearest(metric, sorted(end))}")
        values.setdefault(name, {})[job.seed] = end.get(metric)
        if name not in costs:
            steps = job.experiment.train.steps
            costs[name] = {"steps": steps, "flops": flops_per_step(job.experiment) * steps}
    variants = list(dict.fromkeys(j.variant for j in all_jobs))
    results = sweep.analyze(variants, values, metric, LOWER_IS_BETTER.value, costs)
    results |= {"experiment": EXPERIMENT.value, "edits": EDIT.value, "sets": SET.value, "equal": EQUAL.value}
    results["notes"] = notes
    text = sweep.table(results)
    storage.write_json(root / "results.json", results)
    storage.write_text(root / "table.md", text)
    sweep.plot(results, root / "report" / "sweep.png")
    print(f"\n{text}\nwritten: {root / 'results.json'}, {root / 'table.md'}, {root / 'report' / 'sweep.png'}")


def main() -> int:
    if EXPERIMENT.value is None or WORKDIR.value is None:
        raise UserError("--experiment=NAME and --workdir=DIR are needed")
    all_jobs, notes = jobs()
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    todo = [j for j in all_jobs if not finished(j)]
    if PRINT_COMMANDS.value:
        print("\n".join(shlex.join(j.command) for j in todo))
        return 0
    groups, why = programs(todo) if AT_ONCE.value > 1 else ([[j] for j in todo], [])
    for note in why:
        print(f"note: {note}", file=sys.stderr)
    if DRY_RUN.value:
        for job in all_jobs:
            cost = flops_per_step(job.experiment) * job.experiment.train.steps
            state = "to run" if job in todo else "finished"
            print(f"{job.variant.name}, seed {job.seed}: {job.experiment.train.steps} steps, {cost:.3g} FLOPs, {state}")
        print(f"{len(todo)} of {len(all_jobs)} runs to do" + f", in {len(groups)} programs" * (AT_ONCE.value > 1))
        return 0
    # Those alone come first: they have processes of their own, which need the devices that this one takes later.
    for i, members in enumerate(sorted(groups, key=lambda members: len(members) > 1)):
        label = f"[{i + 1}/{len(groups)}]"
        code = run(members[0], label) if len(members) == 1 else run_together(members, label)
        if code == exits.EXIT_PREEMPTED:
            return code
    answer(all_jobs, notes)
    return 0


if __name__ == "__main__":
    common.run(main)
