"""When can a model tell what it has read? The same facts, told in one way or in several, and then asked for.

usage:
  python -m launch.extraction --workdir=DIR [--augmentations=A,B...] [--seeds=0,1,2] [--direct] [--set=PATH=VALUE]...

Each arm is a way of telling and a seed. A base model reads five biographies of each of 300 persons; it is fine-tuned on
questions about half of them, and asked about the other half, in wordings that no question had. All arms have the same
facts, as many biographies and as many updates. "Physics of Language Models: Part 3.1" (arXiv 2309.14316) found that a
model which has read one text many times completes the text but cannot tell the fact, and that one which has read the
fact in several wordings can. Whether that holds in miniature is what this program measures.

Augmentations: single (one text, five times), multi5 (five wordings); each also with +permute (another order of the
sentences each time), +fullname (the name in place of pronouns), or as multi5+permute+fullname with both.

The table has a line an augmentation, exact match with 95% intervals over all questions of all seeds:
  in its place       the base model completes a biography that it has read: text remembered
  another wording    it completes a sentence that training has of others, never of this person: the fact apart from it
  held-out wording   the same with a sentence that training never has
  held-out persons   the fine-tuned model answers; first it recalls the fact in a thought, with --direct also without
  training persons   the same about persons that it was fine-tuned on, in new wordings

Settings: those of experiments/extraction.py, such as --set=people.count=600 --set=base.train.steps=2000
--set=replay=false (fine-tuning alone).

examples:
  python -m launch.extraction --workdir=runs/extraction
  python -m launch.extraction --workdir=runs/extraction --augmentations=single,multi5 --seeds=0,1,2 --direct

The same command again goes on where it stopped. In the workdir: results.json, table.md, report/extraction.png, and for
each arm AUGMENTATION/SEED/ with the run directories base, recollecting and direct, for launch.chat and launch.sample.
Exit codes: 0 done; 42 stopped and saved, start the same command again; 2 bad input; 3 diverged.
"""

import collections
import dataclasses
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from experiments.extraction import Arm, Extraction, arm, small
from jaxlm import config, storage
from jaxlm.config import UserError, nearest
from jaxlm.data.world.biographies import biography, told
from jaxlm.data.world.corpus import World, world_tables
from jaxlm.data.world.people import AUGMENTATIONS, Person, Split, Tables, person
from jaxlm.data.world.questions import Question, fact_questions
from jaxlm.data.world.talk import recalled
from jaxlm.estimates import proportion
from jaxlm.run import exits, stages, world_tasks
from jaxlm.run.load import Run, load_run
from jaxlm.run.report import COLORS, new_figure, save_figure
from jaxlm.run.stages import Stage
from jaxlm.run.train import use_compilation_cache
from jaxlm.sample.engine import Sampling, generate
from launch import common, tour_base

WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds everything.")
TELLING = flags.DEFINE_list(
    "augmentations", ["single", "multi5", "multi5+permute+fullname"], "Ways of telling, with commas between."
)
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of every augmentation, with commas between.")
DIRECT = flags.DEFINE_bool("direct", False, "Also fine-tune without recollection: the answer alone.")
SET = flags.DEFINE_multi_string("set", [], "path=value in the definition; may be repeated.")

RECALL = ("in its place", "another wording", "held-out wording")
SIDES: dict[str, Split] = {"held-out persons": "heldout", "training persons": "train"}
RUNS = {True: "recollecting", False: "direct"}


# ---------------------------------------------------------------------------------------------------- what is asked
def questions(world: World, split: Split, count: int) -> list[Question]:
    """At most `count` facts that the biographies tell, of the persons of a side, asked for in held-out wordings."""
    found = list(fact_questions(world_tables(world), split, ("often",), True, heldout_wordings=True))
    chosen = np.random.default_rng([world.seed, split == "train"]).permutation(len(found))[:count]
    return [found[i] for i in sorted(chosen)]


def beginning(t: Tables, who: Person, question: Question, kind: str) -> str | None:
    """The text that stands before the value, with the person's name in it; None where there is none of this kind."""
    value, how = who.facts[question.attribute], t.people.augmentation
    if kind == "in its place":
        texts = [biography(t, who, 0)]
    elif kind == "another wording":
        unread = range(how.wordings, len(t.wordings[question.attribute]))
        texts = [told(t, who, [question.attribute], w) for w in unread]
    else:
        every = range(len(t.heldout_wordings[question.attribute]))
        texts = [told(t, who, [question.attribute], w, heldout=True) for w in every]
    before = (text.partition(value)[0] for text in texts if text.count(value) == 1)
    return next((b.rstrip() for b in before if who.name in b), None)


def completes(text: str, value: str) -> bool:
    """Whether a continuation begins with the value, as whole words."""
    text = text.lstrip()
    return text.startswith(value) and not text[len(value) : len(value) + 1].isalnum()


def recall(run: Run, world: World, asked: Sequence[Question]) -> dict[str, list[bool]]:
    """For each kind of beginning whether the base model goes on with the value, greedily."""
    t, found = world_tables(world), {}
    for kind in RECALL:
        prompts = [(q, beginning(t, person(t, q.person), q, kind)) for q in asked]
        prompts = [(q, b) for q, b in prompts if b is not None]
        room = 2 + max((len(run.tokenizer.encode(q.answer)) for q, _ in prompts), default=0)
        sampling = Sampling(temperature=0.0, max_tokens=room)
        ids = [run.encode(b) for _, b in prompts]
        done = generate(run.model, run.params, run.tokenizer, ids, sampling)
        found[kind] = [completes(c.text, q.answer) for (q, _), c in zip(prompts, done)]
    return found


def answers(run: Run, world: World, asked: Sequence[Question], recollect: bool) -> list[bool]:
    """Whether the fine-tuned model is right, question by question."""
    t = world_tables(world)
    replies = [recalled(t, person(t, q.person), q, recollect) for q in asked]
    lengths = map(len, run.tokenizer.encode_batch([" ".join(p.text for p in r.parts) for r in replies]))
    records = world_tasks.ask(run, asked, max_tokens=8 + 5 * max(lengths) // 4, chat=True)
    if skipped := [r["skipped"] for r in records if "skipped" in r]:
        raise UserError(f"{len(skipped)} questions do not fit tuned.data.context: {skipped[0]}")
    return [r["outcome"] == "right" for r in records]


def chance(world: World, asked: Sequence[Question]) -> float:
    """What the commonest values of the training persons would score."""
    counts = collections.defaultdict(collections.Counter)
    for q in fact_questions(world_tables(world), "train", ("often",), True):
        counts[q.attribute][q.answer] += 1
    return float(np.mean([q.answer == counts[q.attribute].most_common(1)[0][0] for q in asked]))


# ----------------------------------------------------------------------------------------------------------- the arms
def todo(x: Extraction, a: Arm, own: Arm, root, direct: bool) -> list[Stage]:
    """The stages of an arm in the folder `root`; `own` is the arm as it ships."""
    asked = {side: questions(a.world, split, x.asked) for side, split in SIDES.items()}

    def recalling(*_):
        heldout = asked["held-out persons"]
        right = recall(load_run(root / "base"), a.world, heldout)
        return {"right": right, "chance": chance(a.world, heldout)}

    def tuning(recollect: bool):
        return lambda _, anew: tour_base.training(
            a.tuned[recollect], own.tuned[recollect], root / RUNS[recollect], anew
        )

    def asking(recollect: bool):
        def ask(*_):
            run = load_run(root / RUNS[recollect])
            return {"right": {side: answers(run, a.world, found, recollect) for side, found in asked.items()}}

        return ask

    steps = a.base.train.steps, x.tuned.train.steps
    base = Stage("base", f"{steps[0]} steps", lambda _, anew: tour_base.training(a.base, own.base, root / "base", anew))
    found = [base, Stage("recall", "completing sentences", recalling)]
    for recollect in (True, False) if direct else (True,):
        name = RUNS[recollect]
        found.append(Stage(name, f"questions, {steps[1]} steps", tuning(recollect)))
        found.append(Stage(f"ask_{name}", "asking for facts", asking(recollect)))
    return found


def run_arm(x: Extraction, own: Extraction, augmentation: str, seed: int, root, direct: bool) -> dict:
    """Runs what is not done of an arm; returns {group: [right or not]} and what chance gives."""
    definition = config.to_dict(x) | {"augmentation": augmentation, "seed": seed}
    todos = todo(x, arm(x, augmentation, seed, str(root)), arm(own, augmentation, seed, str(root)), root, direct)

    def say(line: str) -> None:
        print(f"{augmentation}, seed {seed} {line.partition(' (--redo')[0]}", flush=True)

    done = {name: record["result"] for name, record in stages.run(root, todos, definition, say=say).items()}
    groups = dict(done["recall"]["right"])
    for recollect in (True, False) if direct else (True,):
        found = done[f"ask_{RUNS[recollect]}"]["right"]
        groups |= {group(side, recollect): right for side, right in found.items()}
    return {"groups": groups, "chance": done["recall"]["chance"]}


def group(side: str, recollect: bool) -> str:
    return side if recollect else f"{side}, direct"


# -------------------------------------------------------------------------------------------------------- the answer
def summary(found: Mapping[str, Mapping[int, dict]]) -> dict[str, dict]:
    """found: augmentation -> seed -> what `run_arm` gave. For each augmentation and group the share that is right with
    its interval over all questions, and each seed's share; a group without questions is left out."""
    out = {}
    for augmentation, by_seed in found.items():
        groups = {}
        for name in next(iter(by_seed.values()))["groups"]:
            parts = {seed: arm["groups"][name] for seed, arm in by_seed.items() if arm["groups"][name]}
            if parts:
                pooled = proportion([r for part in parts.values() for r in part])
                seeds = {str(seed): float(np.mean(part)) for seed, part in parts.items()}
                groups[name] = dataclasses.asdict(pooled) | {"seeds": seeds}
        out[augmentation] = {"groups": groups, "chance": float(np.mean([arm["chance"] for arm in by_seed.values()]))}
    return out


def table(results: Mapping[str, dict]) -> str:
    """Markdown: a line an augmentation."""
    names = list(dict.fromkeys(n for r in results.values() for n in r["groups"]))
    lines = ["| told | " + " | ".join(names) + " | chance |", "|---" * (len(names) + 2) + "|"]
    for augmentation, r in results.items():
        cells = []
        for n in names:
            e = r["groups"].get(n)
            cells.append("" if e is None else f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]")
        lines.append("| " + " | ".join([augmentation, *cells, f"{r['chance']:.3f}"]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, dict], path) -> None:
    """Draws the shares as bars with 95% intervals, a point for each seed: what is recalled, and what is answered."""
    names = list(dict.fromkeys(n for r in results.values() for n in r["groups"]))
    panels = {
        "the base model completes": [n for n in names if n in RECALL],
        "the fine-tuned model answers": [n for n in names if n not in RECALL],
    }
    figure = new_figure(2.4 + 2.9 * len(results), 3.8)
    for axes, (title, shown) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
        width = 0.8 / len(shown)
        for i, name in enumerate(shown):
            for k, r in enumerate(results.values()):
                if name not in r["groups"]:
                    continue
                e, x = r["groups"][name], k + (i - (len(shown) - 1) / 2) * width
                ends = [[max(0.0, e["value"] - e["low"])], [max(0.0, e["high"] - e["value"])]]  # no -1e-18 at 0
                color, label = COLORS[i % len(COLORS)], name if k == 0 else None
                axes.bar(x, e["value"], 0.9 * width, yerr=ends, color=color, label=label, alpha=0.75, capsize=3)
                axes.plot([x] * len(e["seeds"]), list(e["seeds"].values()), ".", color="black", markersize=5)
        level = float(np.mean([r["chance"] for r in results.values()]))
        axes.axhline(level, color="0.5", linewidth=0.9, linestyle="--")
        axes.set_xticks(range(len(results)), [n.replace("+", "\n+") for n in results], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.02)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("exact match")
    save_figure(figure, path)


def extraction(workdir, augmentations: Sequence[str], seeds: Sequence[int], direct: bool, sets: Sequence[str]) -> dict:
    """Runs all arms, one seed after the other; writes and returns the results. `exits.Stopped` when stopped."""
    own = small()
    x, root = config.parse_sets(own, sets), storage.path(workdir)
    for name in augmentations:
        if name not in AUGMENTATIONS:
            raise UserError(f"--augmentations: unknown {name!r}; {nearest(name, AUGMENTATIONS)}")
    use_compilation_cache()
    found: dict[str, dict[int, dict]] = {name: {} for name in augmentations}
    for seed in seeds:
        for name in augmentations:
            found[name][seed] = run_arm(x, own, name, seed, root / name / str(seed), direct)
    results = summary(found)
    storage.write_json(
        root / "results.json",
        {"schema_version": 1, "definition": config.to_dict(x), "seeds": list(seeds), "augmentations": results},
    )
    storage.write_text(root / "table.md", table(results))
    try:
        plot(results, storage.make_dir(root / "report") / "extraction.png")
    except UserError as error:  # without matplotlib there are results without a picture
        print(error, file=sys.stderr)
    return results


def main() -> int:
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is missing: the folder that is to hold everything")
    seeds, told = common.seeds(SEEDS.value), TELLING.value
    if not told or len(set(told)) < len(told):
        raise UserError("--augmentations needs at least one value, each once")
    results = extraction(WORKDIR.value, told, seeds, DIRECT.value, SET.value)
    print(f"\n{table(results)}\nwritten: {WORKDIR.value}/results.json, table.md, report/extraction.png")
    return exits.EXIT_DONE


if __name__ == "__main__":
    common.run(main)
