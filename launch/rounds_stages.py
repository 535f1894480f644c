"""The stages of launch.rounds: demonstrations, rankings, reward model, PPO, what came of it. Also those of the tour."""

import dataclasses
import json

from experiments.rounds import Rounds, demonstrated, of_round
from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import preference_sources
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.messages import to_messages
from jaxlm.data.world.manners import demonstration, errands
from jaxlm.feedback import pairwise, preferences
from jaxlm.feedback.collect import read_prompts
from jaxlm.feedback.gold import gold
from jaxlm.feedback.journal import Journal
from jaxlm.feedback.lessons import Lesson, write_lessons
from jaxlm.feedback.records import Response, record_id, to_line
from jaxlm.feedback.store import Store
from jaxlm.run import checkpoint, reward, rounds, world_tasks
from jaxlm.run.experiment import Experiment
from jaxlm.run.load import load_experiment, load_run
from jaxlm.run.policy import policy_of
from jaxlm.run.stages import Stage
from jaxlm.sample.engine import Sampling
from jaxlm.tools import by_name
from launch import rounds_evaluation, rounds_page
from launch.training import training


@dataclasses.dataclass(frozen=True)
class Place:
    """Where everything of a definition is."""

    x: Rounds
    own: Rounds  # as its scale ships
    root: object  # a path
    parent: str

    def policy(self, k: int) -> str:
        """The workdir of round k's policy."""
        if k:
            return str(self.root / f"round_{k}" / "ppo")
        return self.parent if self.x.sft is None else str(self.root / "sft")

    def tools(self):
        return by_name(self.x.tools, None, self.root) if self.x.tools else None


def check(x: Rounds) -> None:
    """Raises `UserError` for a definition that cannot run."""
    if min(x.demonstrations, x.prompts, x.heldout, x.samples) < 1 or x.responses < 2 or x.best_of < 2:
        raise UserError("demonstrations, prompts, heldout and samples must be at least 1, responses and best_of 2")
    if x.pool < x.prompts:
        raise UserError(f"each round ranks responses to {x.prompts} new prompts, and pool has {x.pool}")
    if "search" in x.tools:
        raise UserError("tools of the rounds: calculator and python; what search finds no errand needs")


# ---------------------------------------------------------------------------------------------------------- trainings
def demonstrate(p: Place) -> dict:
    """Writes demonstrations.jsonl, prompts.jsonl and heldout.jsonl."""
    if p.x.reward_parent is not None:  # told before anything is trained: the critic reads the policy's ids
        theirs, ours = (tokenizers.load(storage.path(w) / "tokenizer").hash for w in (p.x.reward_parent, p.parent))
        if theirs != ours:
            raise UserError(f"reward_parent {p.x.reward_parent} has another tokenizer than {p.parent}")
    talk, mix, tools = world_tasks.find_world(load_experiment(p.parent)), p.x.mix, p.x.tools
    made = (demonstration(talk, mix, tools, i) for i in range(p.x.demonstrations))
    lessons = (
        Lesson(rounds.shown(e.prompt, reply), {"made_by": "many hands", "kind": e.metadata["kind"]})
        for e, reply in made
    )
    write_lessons(p.root / "demonstrations.jsonl", lessons)
    counts = {}
    for name, split, count in (("prompts", "train", p.x.pool), ("heldout", "heldout", p.x.heldout)):
        found = list(errands(talk, mix, tools, split, count))
        lines = [json.dumps({"messages": to_messages(e.prompt), **e.metadata}) + "\n" for e in found]
        storage.write_text(p.root / f"{name}.jsonl", "".join(lines))
        counts[name] = len(found)
    files = [storage.sha256_file(p.root / f"{n}.jsonl") for n in ("demonstrations", "prompts", "heldout")]
    return {"identity": [checkpoint.saved(p.parent).sha256, *files]} | counts


# ------------------------------------------------------------------------------------------------------- the rankings
def _ranker(p: Place, folder, verdicts: pairwise.Verdicts) -> tuple[str, pairwise.Ranker]:
    """(annotator, how it ranks); a judge's journal is in the folder."""
    if p.x.judge is None:
        return "gold", pairwise.by_scores(gold)
    run = load_run(p.x.judge)
    compare = pairwise.by_probability(rounds.judge(run, Journal(folder)), counts=verdicts)
    return f"judge {policy_of(run).name}", pairwise.by_wins(compare)


def _exported(store: Store, annotator: str, wanted: set[str]) -> list:
    """The annotator's rankings of responses that are all wanted, with all that they are about."""
    responses = {i: r for i, r in store.records(Response) if i in wanted}
    rankings = [r for r in preferences.latest_rankings(store, [annotator]) if responses.keys() >= set(r.shown)]
    about = {r.prompt for r in rankings}
    prompts = [r for i, r in store.prompts().items() if i in about]
    return [*prompts, *(r for r in responses.values() if r.prompt in about), *rankings]


def collecting(p: Place, k: int, done: dict) -> dict:
    """Samples and ranks round k's responses; exports those of all rounds so far to a file that no longer changes."""
    every = read_prompts(p.root / "prompts.jsonl")
    chosen = every[(k - 1) * p.x.prompts : k * p.x.prompts]
    if len(chosen) < p.x.prompts:
        raise UserError(f"round {k} needs {k * p.x.prompts} prompts, and there are {len(every)}: raise pool")
    folder, verdicts = storage.make_dir(p.root / f"round_{k}"), pairwise.Verdicts()
    run, (annotator, rank) = load_run(p.policy(k - 1)), _ranker(p, folder, verdicts)
    sampling = Sampling(max_tokens=p.x.max_tokens, seed=p.x.seed)
    with Store(p.root / "feedback.db") as store:
        found = rounds.respond(store, run, chosen, p.x.responses, sampling, p.tools())
        ids = [record_id(r) for responses in found for r in responses]
        mine = set(ids)
        ranked = pairwise.annotate(
            store, annotator, rank, [record_id(q) for q in chosen], lambda r: record_id(r) in mine
        )  # fmt: skip
        before = [i for n in range(1, k) for i in done[f"collect_{n}"]["result"]["responses"]]
        records = _exported(store, annotator, mine | set(before))
    file = folder / "feedback.jsonl"
    storage.write_text(file, "".join(to_line(r) + "\n" for r in records))
    items = preferences.load(file)
    told = {"rankings": len(items), "pairs": sum(len(i.pairs) for i in items), "annotator": annotator}
    # Not how many were asked: what a former start has ranked, a later one does not ask.
    told |= {"unranked": ranked.unranked, "malformed": verdicts.malformed, "missing": verdicts.missing}
    print(f"{annotator}: {len(items)} rankings of {len(before) + len(ids)} responses; {rounds_page.left_out(told)}")
    return {"identity": preference_sources.fingerprint(items), "responses": ids} | told


def rewarding(p: Place, k: int, e: Experiment, own: Experiment, anew: bool) -> dict:
    """Trains round k's reward model and puts it on a scale: mean 0, deviation 1 over responses of round 0's policy to
    prompts that it has not fitted."""
    folder, source = p.root / f"round_{k}" / "reward", preferences.load(p.root / "round_1" / "feedback.jsonl")
    found = training(e, own, folder, anew)
    _, unfitted = preference_sources.split(e.data.sources[0], source, e.data.valid_fraction)
    pairs = [(i.prompt, rounds.completion(a)) for i in unfitted for a in i.answers]
    scale = reward.set_scale(folder, *zip(*pairs), load_run(p.policy(0)).tokenizer.hash)
    last = found["last"]
    print(
        f"held-out accuracy {last['eval/all/accuracy']:.3f}, calibration error {last['eval/all/calibration_error']:.3f}"
    )
    return found | {"identity": [found["identity"], scale.gain, scale.bias], "scale": dataclasses.asdict(scale)}


# ----------------------------------------------------------------------------------------------------------- the rounds
def todo(p: Place, count: int) -> list[Stage]:
    """The stages of so many rounds."""
    root, first = str(p.root), p.policy(0)
    found = [Stage("demonstrate", "errands, and demonstrations by many hands", lambda *_: demonstrate(p))]
    if p.x.sft is not None:
        pair = [demonstrated(x, root, p.parent) if x.sft is not None else p.x.sft for x in (p.x, p.own)]
        steps = p.x.sft.train.steps
        found.append(Stage("sft", f"{steps} steps", lambda _, anew: training(*pair, p.root / "sft", anew)))
    found.append(
        Stage("baseline", "responses of round 0 to held-out prompts", lambda *_: rounds_evaluation.baseline(p))
    )
    for k in range(1, count + 1):
        found += _round(p, k, root, first)
    return found


def _round(p: Place, k: int, root: str, first: str) -> list[Stage]:
    ours, own = (of_round(x, k, root, first, p.policy(k - 1)) for x in (p.x, p.own))

    def report(done, anew):
        return rounds_page.write(p, k, done)

    return [
        Stage(f"collect_{k}", "sampling and ranking", lambda done, _: collecting(p, k, done)),
        Stage(
            f"reward_{k}",
            f"reward model, {ours[0].train.steps} steps",
            lambda _, anew: rewarding(p, k, ours[0], own[0], anew),
        ),
        Stage(
            f"ppo_{k}",
            f"PPO, {ours[1].train.steps} rollouts",
            lambda _, anew: training(ours[1], own[1], p.root / f"round_{k}" / "ppo", anew),
        ),
        Stage(f"evaluate_{k}", "held-out prompts", lambda *_: rounds_evaluation.evaluate(p, k)),
        Stage(f"report_{k}", "writing the page", report),
    ]
