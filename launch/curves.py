"""Learning curves of reinforcement learning over seeds, each beside its control: what a reward teaches, and what it
would seem to teach if it were the toss of a coin.

usage:
  python -m launch.curves --workdir=DIR --experiments=A[,B...] (--start=NAME | --parent=RUN) [--seeds=0,1,2]
                          [--control=random_reward] [--metric=eval/score] [--since=UPDATE] [--edit=EDIT]...
                          [--set=PATH=VALUE]...

For each seed the definition --start is trained, and from it each of --experiments, once as it is and once with the edit
--control; with --parent all begin from that run. --edit and --set hold for the experiments and their controls,
--start_set=PATH=VALUE for --start.

The answer (table.md, also printed; results.json; report/curves.png): the held-out --metric at the start, at the first
evaluation from --since updates on (default: a quarter of them), the lowest from there on, the highest and the end, in
the mean and for each seed; the same for the control, and its highest above its start, since a control that rises says
that something leaks; the difference of the two at the end, paired by seed with a 95% interval; every other held-out
figure at the start and the end. --since may be another at each call: it is no part of the trainings.

examples:
  python -m launch.curves --workdir=runs/walks --start=walks_sft --experiments=walks_ppo,walks_grpo --since=25
  python -m launch.curves --workdir=runs/sums --start=addition_sft --experiments=addition_grpo --metric=eval/pass@1
  python -m launch.curves --workdir=runs/world --parent=runs/sft --experiments=grpo_tiny --metric=eval/pass@1

The same command again goes on where it stopped; further experiments and seeds may be named then. In the workdir, for
each seed, the run directories SEED/start, SEED/EXPERIMENT and SEED/EXPERIMENT+CONTROL.
Exit codes: 0 done; 42 stopped and saved, start the same command again; 2 bad input; 3 diverged.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from absl import flags

import experiments  # noqa: F401  (registers the definitions)
from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.data import prompts
from jaxlm.data.prompts import Prompts
from jaxlm.run import exits, rl_evals, stages
from jaxlm.run.experiment import Experiment
from jaxlm.run.log import read_metrics
from jaxlm.run.report import COLORS, label_axes, new_figure, save_figure
from jaxlm.run.stages import Stage
from jaxlm.run.statistics import Difference, paired_difference
from jaxlm.run.train import use_compilation_cache
from jaxlm.steps.policy import PolicyGradient
from launch import common
from launch.training import training

WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds everything.")
NAMES = flags.DEFINE_list("experiments", [], "Definitions of reinforcement learning, with commas between.")
START = flags.DEFINE_string("start", None, "Definition that each seed's parent is trained by.")
PARENT = flags.DEFINE_string("parent", None, "Workdir of a run that all seeds begin from, in the place of --start.")
CONTROL = flags.DEFINE_string("control", "random_reward", "Edit that makes an experiment its control.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, with commas between.")
METRIC = flags.DEFINE_string(
    "metric",
    None,
    "Held-out figure that the curves show; default eval/score, which prompts without answers do not have.",
)
SINCE = flags.DEFINE_integer("since", None, "Update from which on the lowest is told.", lower_bound=0)
EDIT = flags.DEFINE_multi_string("edit", [], "Edit of all experiments and their controls; may be repeated.")
SET = flags.DEFINE_multi_string("set", [], "path=value in all experiments and their controls; may be repeated.")
START_SET = flags.DEFINE_multi_string("start_set", [], "path=value in --start; may be repeated.")

Curve = list[tuple[int, float]]  # (updates, value)


# ---------------------------------------------------------------------------------------------------------- trainings
@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be run: `start` is the name of a definition, `parent` a run in its place."""

    names: Sequence[str]
    start: str | None = None
    parent: str | None = None
    control: str = "random_reward"
    edits: Sequence[str] = ()
    sets: Sequence[str] = ()
    start_sets: Sequence[str] = ()

    def arms(self, name: str) -> tuple[str, str]:
        return name, f"{name}+{self.control}"


def definitions(asked: Asked, seed: int, root) -> dict[str, tuple[Experiment, Experiment]]:
    """By the name of its folder each training of a seed, with the definition as it ships to compare it with."""
    found, parent = {}, asked.parent
    if asked.start is not None:
        own = config.resolve(asked.start)
        found["start"] = dataclasses.replace(config.resolve(asked.start, (), asked.start_sets), seed=seed), own
        parent = str(root / "start")
    for name in asked.names:
        own = config.resolve(name)
        if not isinstance(own.objective, PolicyGradient):
            raise UserError(f"--experiments takes reinforcement learning; {name} is another training")
        for arm, edits in zip(asked.arms(name), (asked.edits, [*asked.edits, asked.control])):
            e = config.resolve(name, edits, asked.sets)
            if not isinstance(e.data, Prompts):
                raise UserError(f"{arm} learns from Prompts, and data is {type(e.data).__name__}")
            found[arm] = dataclasses.replace(e, seed=seed, parent=parent), own
    return found


def run_seed(asked: Asked, seed: int, root) -> dict[str, list[dict]]:
    """Trains what is not trained; returns for each arm the records of its evaluations."""
    todo = definitions(asked, seed, root)

    def stage(name: str) -> Stage:
        e, own = todo[name]
        about = f"{e.train.steps} updates"
        after = () if name == "start" or asked.start is None else ("start",)
        return Stage(name, about, lambda _, anew: training(e, own, root / name, anew), (name,), after)

    def say(line: str) -> None:
        print(f"seed {seed} {line.partition(' (--redo')[0]}", flush=True)

    stages.run(root, [stage(n) for n in todo], {n: config.to_dict(e) for n, (e, _) in todo.items()}, say=say)
    return {n: [r for r in read_metrics(root / n) if "eval/reward" in r] for n in todo if n != "start"}


# --------------------------------------------------------------------------------------------------------- the answer
def curve(records: Sequence[Mapping], metric: str) -> Curve:
    found = [(r["step"], r[metric]) for r in records if math.isfinite(r.get(metric, math.nan))]
    if not found:
        known = sorted({k for r in records for k in r if k.startswith("eval/")})
        raise UserError(f"no figure {metric!r} was measured; --metric is one of {', '.join(known)}")
    return found


def course(points: Curve, since: int | None = None) -> dict[str, float]:
    """Start, at the first point from `since` updates on (unset: a quarter of them), lowest from there, highest, end."""
    first = points[-1][0] / 4 if since is None else since
    values = [v for _, v in points]
    later = [v for step, v in points if step >= first] or values[-1:]  # an alarm may have ended it before
    return {"start": values[0], "since": later[0], "lowest since": min(later), "highest": max(values),
            "end": values[-1]}  # fmt: skip


def results(
    asked: Asked, found: Mapping[int, Mapping[str, Sequence[Mapping]]], metric: str, since: int | None = None
) -> dict:
    """found: seed -> arm -> records. Everything as JSON, by the name of the experiment."""
    out = {}
    for name in asked.names:
        arms = {}
        for arm in asked.arms(name):
            of = {seed: by_arm[arm] for seed, by_arm in found.items()}
            others = sorted(set.intersection(*(set(r) for rs in of.values() for r in (rs[0], rs[-1]))) - {"step"})
            arms[arm] = {
                "curves": {str(seed): curve(rs, metric) for seed, rs in of.items()},
                "course": {str(seed): course(curve(rs, metric), since) for seed, rs in of.items()},
                "others": {
                    k: {str(seed): [rs[0][k], rs[-1][k]] for seed, rs in of.items()}
                    for k in others
                    if k.startswith("eval/") and k != metric
                },
            }
        ends = [{int(s): c["end"] for s, c in arms[arm]["course"].items()} for arm in asked.arms(name)]
        gain = paired_difference(*ends)
        out[name] = {"arms": arms, "gain": None if gain is None else dataclasses.asdict(gain)}
    return out


def _cell(values: Sequence[float]) -> str:
    each = ", ".join(f"{v:.3f}" for v in values)
    return f"{sum(values) / len(values):.3f} ({each})"


def table(found: Mapping[str, Mapping], metric: str, since: int | None = None) -> str:
    """Markdown: a line an arm, then what the experiments gain over their controls, then the other figures."""
    columns = ("start", "since", "lowest since", "highest", "end")
    then = "after a quarter" if since is None else f"from update {since}"
    heads = ("at the start", then, "lowest since", "highest", "at the end")
    lines = [f"| {metric} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, arm in ((n, a) for r in found.values() for n, a in r["arms"].items()):
        courses = arm["course"].values()
        lines.append(f"| {name} | " + " | ".join(_cell([c[k] for c in courses]) for k in columns) + " |")
    lines.append("")
    for name, r in found.items():
        control = list(r["arms"])[1]
        rises = [c["highest"] - c["start"] for c in r["arms"][control]["course"].values()]
        gain = None if r["gain"] is None else Difference(**r["gain"])
        interval = "" if gain is None or gain.low is None else f" [{gain.low:+.3f}, {gain.high:+.3f}]"
        ahead = "" if gain is None else f"ends {gain.mean:+.3f}{interval} beside its control, which "
        lines.append(f"{name}: {ahead or 'its control '}rises by at most {max(rises):.3f} above its start.")
    lines += ["", "| arm | figure | at the start | at the end |", "|---|---|---|---|"]
    for name, arm in ((n, a) for r in found.values() for n, a in r["arms"].items()):
        for k, pairs in arm["others"].items():
            first, last = zip(*pairs.values())
            lines.append(f"| {name} | {k} | {_cell(first)} | {_cell(last)} |")
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Mapping], metric: str, path) -> None:
    """A panel an experiment: a line for each seed, and the mean over them, of the arm and of its control."""
    figure = new_figure(1 + 4.6 * len(found), 3.8)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, r) in zip(panels, found.items()):
        for color, (arm, values) in zip((COLORS[0], COLORS[1]), r["arms"].items()):
            curves = list(values["curves"].values())
            for points in curves:
                axes.plot(*zip(*points), color=color, alpha=0.35, linewidth=1)
            shared = sorted(set.intersection(*({step for step, _ in c} for c in curves)))
            means = [sum(dict(c)[step] for c in curves) / len(curves) for step in shared]
            axes.plot(shared, means, "o-", color=color, markersize=3, label=arm)
        label_axes(axes, "updates", metric.removeprefix("eval/"))
        axes.set_title(name, fontsize=10)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------ command
def curves(workdir, asked: Asked, seeds: Sequence[int], metric: str = "eval/score", since: int | None = None) -> dict:
    """Runs what is not done, one seed after the other; writes and returns the results. `exits.Stopped` when stopped."""
    root = storage.path(workdir)
    for seed in seeds:
        todo = definitions(asked, seed, root)  # a wrong name or setting is told before anything is trained
        for name in asked.names:
            for arm in asked.arms(name):
                e = todo[arm][0]
                known = rl_evals.names(e.objective, prompts.answered(e.data))
                if metric not in known:
                    raise UserError(f"--metric: {arm} measures no {metric!r}; {config.nearest(metric, known)}")
            if since is not None and since > todo[name][0].train.steps:
                raise UserError(f"--since={since} is beyond the {todo[name][0].train.steps} updates of {name}")
    use_compilation_cache()
    found = results(asked, {seed: run_seed(asked, seed, root / str(seed)) for seed in seeds}, metric, since)
    about = {"schema_version": 1, "metric": metric, "since": since, "seeds": list(seeds)}
    about |= {"asked": dataclasses.asdict(asked), "experiments": found}
    storage.write_json(root / "results.json", about)
    storage.write_text(root / "table.md", table(found, metric, since))
    try:
        plot(found, metric, root / "report" / "curves.png")
    except UserError as e:
        print(f"no plot: {e}")
    return found


def main() -> int:
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is missing: the folder that is to hold everything")
    if not NAMES.value or len(set(NAMES.value)) < len(NAMES.value):
        raise UserError("--experiments needs at least one definition, each once; launch.train --list shows them")
    if (START.value is None) == (PARENT.value is None):
        raise UserError("one of --start=NAME and --parent=RUN is needed: what the experiments begin from")
    metric = METRIC.value or "eval/score"
    asked = Asked(NAMES.value, START.value, PARENT.value, CONTROL.value, EDIT.value, SET.value, START_SET.value)
    found = curves(WORKDIR.value, asked, common.seeds(SEEDS.value), metric, SINCE.value)
    print(f"\n{table(found, metric, SINCE.value)}")
    return exits.EXIT_DONE


if __name__ == "__main__":
    common.run(main)
