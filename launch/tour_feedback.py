"""The stages of the tour that learn from feedback: rankings, a reward model, PPO, checked rewards, an arena."""

from dataclasses import replace

from experiments.tour import Tour
from jaxlm.feedback.store import Store
from jaxlm.run import side_by_side
from jaxlm.run.load import load_run
from jaxlm.run.log import read_metrics
from jaxlm.run.stages import Stage
from launch import rounds_evaluation, rounds_stages, tour_assistant
from launch.rounds_stages import Place
from launch.training import training

ASKED = ("world", "talk", "seed")  # what of the definition the questions follow from
TOLD = ("pass@", "majority@", "greedy", "length", "thinking/")  # of a policy before and after, by how its metric begins


def place(t: Tour, own: Tour, root) -> Place:
    """Where the round of rankings stands; it begins with the assistant that knows its limits."""
    return Place(t.feedback, own.feedback, root / "feedback", str(root / "honest"))


def todo(t: Tour, own: Tour, root, known: tuple[str, ...]) -> list[Stage]:
    """One round as launch.rounds runs it, reinforcement learning on checked rewards, and who wins against whom.

    known: the stages that lead to the assistant that knows its limits.
    """
    p, verified = place(t, own, root), root / "verified"

    def learn(done, anew):
        return verify(t, own, verified, anew)

    def show(done, anew):
        return together(t, {"base": root / "pretrain", **policies(p, root)})

    found = rounds_stages.todo(p, 1)
    names = [s.name for s in found]
    found = [replace(s, reads=("feedback",), after=(*known, *names[:i])) for i, s in enumerate(found)]
    every = (*known, *names, "verify")
    return [
        *found,
        Stage("verify", f"checked rewards, {t.verified.train.steps} rollouts", learn, ("verified",), known),
        Stage("arena", "all policies against each other", lambda *_: arena(p, root), ("feedback",), every),
        Stage("side_by_side", "all models, the same questions", show, ASKED, every),
    ]


def verify(t: Tour, own: Tour, workdir, anew: bool) -> dict:
    """Trains; what held-out problems say before and after."""
    found = training(t.verified, own.verified, workdir, anew)
    evaluated = [r for r in read_metrics(workdir) if "eval/pass@1" in r]
    told = {
        when: {k.removeprefix("eval/"): v for k, v in r.items() if k.removeprefix("eval/").startswith(TOLD)}
        for when, r in (("before", evaluated[0]), ("after", evaluated[-1]))
    }
    both = {k: v for k, v in told["after"].items() if k in told["before"]}
    print("; ".join(f"{k} {told['before'][k]:.3f} -> {v:.3f}" for k, v in both.items()))
    return found | {"told": told, "problems": t.verified.objective.heldout_prompts}


def policies(p: Place, root) -> dict:
    """The folders of all models that answer, by what they are called."""
    return {
        "assistant": root / "assistant",
        "that knows its limits": root / "honest",
        **({} if p.x.sft is None else {"many hands": p.policy(0)}),
        "PPO": p.policy(1),
        "checked rewards": root / "verified",
    }


def together(t: Tour, folders: dict) -> dict:
    """What each model says to a held-out question of each kind."""
    runs = {name: load_run(folder) for name, folder in folders.items()}
    rows = side_by_side.side_by_side(runs, tour_assistant.one_of_each(t))
    print(side_by_side.text(rows))
    return {"rows": rows}


def arena(p: Place, root) -> dict:
    """Elo by the gold of one response of each to the same held-out errands."""
    runs = {name: load_run(folder) for name, folder in policies(p, root).items()}
    with Store(p.root / "evaluation.db") as store:
        return rounds_evaluation.standings(p, runs, store, "gold, tour", "arena")
