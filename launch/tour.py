"""Every stage in order, from raw text to an assistant with tools that knows its limits, and one page that shows it.

usage:
  python -m launch.tour --scale=smoke|tiny|small --workdir=DIR [--set=PATH=VALUE]... [--only=STAGE]... [--redo=STAGE]...

Stages: curate, tokenize, pretrain, evaluate, sample, midtrain (the same biographies as thoughts, and problems, in the
form of conversations), assist (fine-tuning on conversations about people), facts (what it says of people that
fine-tuning had not a word about), probe (what it knows, and conversations that say so), honest (fine-tuning on those),
reprobe, tools, prompting; a round of launch.rounds (demonstrate, sft, baseline, collect_1, reward_1, ppo_1,
evaluate_1, report_1: rankings of its answers, a reward model, PPO), verify (rewards that are checked), arena,
side_by_side (every model that was trained, asked the same), report.
The same command again skips what is done and goes on where it stopped, in mid-training too. --only runs the stages
named, whose forerunners must be done; --redo runs one again from scratch, with other settings if you like, and after it
whatever depends on its outcome; a run that has to make room stands beside it.

Scales, all on a made-up world whose truth is known and on the text that every Python brings along (its documentation,
docstrings and library source):
  smoke   minutes on 2 CPU cores: to see that everything runs; too small to learn much
  tiny    about an hour on 2 CPU cores: to see it learn
  small   a GPU
Your own text beside the world: --set='text=Files(path=FILE_OR_FOLDER)'. Any other setting of the definition, which is
in experiments/tour.py: base.PATH, midtrain.PATH, assistant.PATH, honest.PATH and verified.PATH are those of
launch.train, and feedback.PATH those of launch.rounds.

examples:
  python -m launch.tour --scale=smoke --workdir=runs/tour
  python -m launch.tour --scale=tiny --workdir=runs/tiny --set=seed=1
  python -m launch.tour --scale=tiny --workdir=runs/tiny --set=honest.objective.doubt=1.5 --redo=honest

In the workdir: pretrain/, midtrain/, assistant/, honest/, feedback/round_1/ppo and verified/ (run directories, for
launch.chat, launch.sample and launch.eval), stages/ (what each stage found, as JSON), probe/, tools/, prompting/,
feedback/ (as launch.rounds leaves it), report/index.html (the page, which needs no other file).
Exit codes: 0 done; 42 stopped and saved, start the same command again; 2 bad input; 3 diverged.
"""

from absl import flags

from experiments.tour import TOURS, Tour, connected
from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.run import exits, lineage, stages
from jaxlm.run.load import load_run
from jaxlm.run.stages import Stage
from jaxlm.run.train import use_compilation_cache
from launch import common, rounds_stages, tour_assistant, tour_base, tour_feedback, tour_page

SCALE = flags.DEFINE_enum("scale", "smoke", sorted(TOURS), "How large; see above.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds everything of the tour.")
SET = flags.DEFINE_multi_string("set", [], "path=value in the definition, after those of the scale; may be repeated.")
ONLY = flags.DEFINE_multi_string("only", [], "Run this stage alone; may be repeated.")
REDO = flags.DEFINE_multi_string("redo", [], "Run this stage again from scratch; may be repeated.")

# Which stage trains what stands below a path of the definition: the first path that fits.
TRAINED = {
    "base.": "pretrain",
    "midtrain.": "midtrain",
    "assistant.": "assist",
    "honest.": "honest",
    "feedback.sft.": "sft",
    "feedback.reward.": "reward_1",
    "feedback.ppo.": "ppo_1",
    "feedback.": "demonstrate",
    "verified.": "verify",
}


# What questions hang on of how the last of the models is taught to talk; how much of what it is taught is not among it.
ASKED = ("world", "assistant", "recollect", "part", "tools")


# ----------------------------------------------------------------------------------------------------------- the tour
def definition(scale: str, sets: list[str], root: str) -> tuple[Tour, Tour]:
    """(the tour at this scale with `sets`, the same without), both as they run in the folder `root`."""
    own = TOURS[scale]()
    t = config.parse_sets(own, sets)
    rounds_stages.check(t.feedback)
    return connected(t, root), connected(own, root)


def fields(t: Tour) -> dict:
    """What stages read of the definition."""
    taught = config.to_dict(tour_assistant.talk(t))
    return config.to_dict(t) | {"talk": {name: taught[name] for name in ASKED}}


def todo(t: Tour, base: Tour, root, command: str) -> list[Stage]:
    """The stages of a tour in the folder `root`."""
    run, middle, assistant, honest = (root / name for name in ("pretrain", "midtrain", "assistant", "honest"))

    def trained(e, own, workdir):
        return lambda done, anew: tour_base.training(e, own, workdir, anew)

    def prompting(done, anew):
        runs = {"base": load_run(run), "assistant": load_run(assistant), "honest": load_run(honest)}
        return tour_assistant.prompting(t, runs, root / "prompting")

    def report(done, anew):
        tour_page.page(root, command, done).write(root / "report" / "index.html")
        return {"page": "report/index.html"}

    def facts(done, anew):
        return tour_assistant.facts(t, load_run(run), load_run(middle), load_run(assistant))

    def probe(done, anew):
        return tour_assistant.probing(t, load_run(assistant), root / "probe")

    def reprobe(done, anew):
        return tour_assistant.probing_again(t, load_run(honest), root / "probe")

    def tools(done, anew):
        return tour_assistant.tools(t, load_run(honest), root / "tools")

    steps = [e.train.steps for e in (t.base, t.midtrain, t.assistant, t.honest)]
    asked = ("world", "talk", "seed", "asked")  # of the definition
    text = ("curate", "tokenize", "pretrain")
    talk = (*text, "midtrain", "assist")
    known = (*talk, "probe", "honest")
    own = {"reads": ("base",), "after": text}
    return [
        Stage("curate", "reading and cleaning the text", lambda *_: tour_base.curate(t.base), ("base",)),
        Stage("tokenize", "a vocabulary; cutting and packing", lambda *_: tour_base.tokenize(t.base), ("base",)),
        Stage("pretrain", f"training for {steps[0]} steps", trained(t.base, base.base, run), ("base",)),
        Stage("evaluate", "held-out text and small skills", lambda *_: tour_base.evaluate(t.base, run), **own),
        Stage("sample", "held-out beginnings continued", lambda *_: tour_base.sample(run, root / "report"), **own),
        Stage(
            "midtrain",
            f"what conversations look like, {steps[1]} steps",
            trained(t.midtrain, base.midtrain, middle),
            reads=("midtrain",),
            after=text,
        ),
        Stage(
            "assist",
            f"conversations about people, {steps[2]} steps",
            trained(t.assistant, base.assistant, assistant),
            reads=("assistant",),
            after=(*text, "midtrain"),
        ),
        Stage("facts", "asking for facts before and after", facts, asked, talk),
        Stage("probe", "finding out what it knows", probe, (*asked, "probed", "samples"), talk),
        Stage(
            "honest",
            f"what the probe wrote, {steps[3]} steps",
            trained(t.honest, base.honest, honest),
            reads=("honest",),
            after=(*talk, "probe"),
        ),
        Stage("reprobe", "the same questions once more", reprobe, ("honest", "samples"), known),
        Stage("tools", "with tools and without", tools, asked, known),
        Stage("prompting", "more and fewer examples; all models side by side", prompting, (*asked, "shots"), known),
        *tour_feedback.todo(t, base, root, known),
        Stage("report", "writing the page", report),
    ]


def _check(root, t: Tour, redo: list[str]) -> None:
    """Raises `UserError` where the folder has trainings of another definition that are not done again."""
    experiments = tuple(path for path in TRAINED if path != "feedback.")
    again = tuple(path for path, stage in TRAINED.items() if stage in redo)

    def kept(line: str) -> bool:
        path = next((p for p in TRAINED if line.startswith(p)), None)
        return path is not None and path not in again

    if lines := [line for line in lineage.differences(root, t, experiments) if kept(line)]:
        raise UserError(f"{lineage.held(root, lines)}; choose another --workdir, or what to do again: --redo=STAGE")


def tour(workdir, scale: str, sets: list[str], only: list[str], redo: list[str]) -> dict[str, dict]:
    """Runs the stages in `workdir`; returns their records. Raises `exits.Stopped` when training was stopped."""
    root = storage.path(workdir)
    t, base = definition(scale, sets, str(root))
    command = " ".join(
        ["python -m launch.tour", f"--scale={scale}", *(f"--set='{s}'" for s in sets), f"--workdir={workdir}"]
    )
    todos = todo(t, base, root, command)
    _check(root, t, redo)
    storage.make_dir(root)
    storage.write_json(root / "config.json", {"schema_version": config.SCHEMA_VERSION} | config.to_dict(t))
    use_compilation_cache()
    return stages.run(root, todos, fields(t), only, redo, lambda x: print(x, flush=True))


def main() -> int:
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is missing: the folder that is to hold the tour")
    done = tour(WORKDIR.value, SCALE.value, SET.value, ONLY.value, REDO.value)
    seconds = sum(r["seconds"] for r in done.values())
    print(f"\n{seconds / 60:.1f} minutes in all")
    if "report" in done:
        print(f"look at  {storage.path(WORKDIR.value) / 'report' / 'index.html'}")
        print(f"talk     python -m launch.chat --workdir={WORKDIR.value}/honest")
        print(f"try      python -m launch.sample --workdir={WORKDIR.value}/pretrain --prompt='import '")
    return exits.EXIT_DONE


if __name__ == "__main__":
    common.run(main)
