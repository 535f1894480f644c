"""What is trained in `launch.bench_rl`: random walks by GRPO and DPO, alike for both sides, and how they are judged."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.rl import WALK, walks_grpo
from jaxlm import rng
from jaxlm.config import UserError
from jaxlm.data import preference_sources, prompts
from jaxlm.data.preference_sources import Comparisons
from jaxlm.data.preferences import Preferences
from jaxlm.data.prompts import Prompts, Walks
from jaxlm.data.tasks import walks
from jaxlm.losses.preference import Dpo
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.run.load import Run
from jaxlm.steps import rollout
from jaxlm.steps.preference import Preference
from jaxlm.steps.rollout import Sample, Sampler
from jaxlm.steps.update import Train

CONTEXT = 2 + WALK  # the start, a node, and what is sampled
VALID = 0.1  # share of the prompts whose pairs neither side trains on: our driver validates on them


@dataclasses.dataclass(frozen=True)
class Load:
    """How much is done: `updates` of each method for each of `seeds`.

    walks: sampled from each start for the pairs, two a pair. pairs: in a batch. judged: walks from each start by which
    a policy is judged.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    updates: int = 100
    walks: int = 100
    pairs: int = 32
    judged: int = 64


# ------------------------------------------------------------------------------------------------------ definitions
def grpo(parent: str, task: Walks, load: Load, seed: int) -> Experiment:
    """walks_grpo, without what the other side does not do: scoring by the parent, checks before the first step, an
    evaluation that is worth the name."""
    e = walks_grpo()
    objective = dataclasses.replace(
        e.objective, reference=False, preflight="off", heldout_prompts=1, heldout_samples=1, slots=e.train.batch_size
    )
    return dataclasses.replace(
        e, data=dataclasses.replace(e.data, task=task), objective=objective, **_around(e.train, parent, load, seed)
    )


def dpo(parent: str, pairs: str, load: Load, seed: int) -> Experiment:
    """DPO from a file of pairs, one pair a row of a batch, with walks_grpo's optimizer but for its large eps."""
    e = walks_grpo()
    optimizer = dataclasses.replace(e.optimizer, lr=1e-4, eps=1e-5)
    data = Preferences(
        sources=(Comparisons(pairs, as_text=True),), valid_fraction=VALID, context=2 * CONTEXT, answers=2
    )
    return dataclasses.replace(
        e, data=data, objective=Preference(Dpo(beta=0.1)), optimizer=optimizer,
        **_around(Train(batch_size=load.pairs), parent, load, seed),
    )  # fmt: skip


def _around(train: Train, parent: str, load: Load, seed: int) -> dict:
    n = load.updates
    return {
        "parent": parent,
        "train": dataclasses.replace(train, steps=n, log_every=1),
        "evaluation": Evaluation(every=n, max_batches=1),
        "checkpoint": Checkpointing(every=n),
        "seed": seed,
    }


def arguments(e: Experiment) -> dict:
    """The same settings by TRL's names."""
    o, t = e.optimizer, e.train
    found = {
        "max_steps": t.steps, "per_device_train_batch_size": t.batch_size,
        "gradient_accumulation_steps": t.accumulation, "learning_rate": o.lr, "lr_scheduler_type": "linear",
        "warmup_steps": o.schedule.warmup, "adam_beta1": o.b1, "adam_beta2": o.b2, "adam_epsilon": o.eps,
        "weight_decay": o.weight_decay, "max_grad_norm": t.clip, "seed": e.seed,
    }  # fmt: skip
    if isinstance(e.objective, Preference):
        loss = e.objective.loss
        return found | {"beta": loss.beta, "label_smoothing": loss.label_smoothing, "loss_type": ["sigmoid"]}
    p = e.objective
    return found | {
        "num_generations": p.samples, "num_iterations": p.epochs, "steps_per_generation": p.minibatches,
        "max_completion_length": p.max_tokens, "temperature": p.temperature, "epsilon": p.loss.ratio.clip_low,
        "epsilon_high": p.loss.ratio.clip_high, "beta": 0.0, "loss_type": "grpo", "scale_rewards": "group",
    }  # fmt: skip


# What differs all the same, as far as it is known.
DIFFERS = {
    "grpo": {
        "advantage": "TRL divides by a group's deviation + 1e-4, we by the deviation",
        "draws": "each side has its own random numbers",
        "tokens": "ours never samples control tokens but the end, TRL may",
        "rows": "ours packs walks into rows, TRL pads them",
    },
    "dpo": {
        "order of the pairs": "each side shuffles by its own rule",
        "rows": "ours packs the two walks of a pair into a row, TRL pads four columns of them apart",
        "validation": "ours validates once at the end, TRL never",
    },
}


# ------------------------------------------------------------------------------------------------- walks and judges
def task_of(run: Run) -> Walks:
    """The walks that a run has read. `UserError` where it has read none, or not letter by letter."""
    found = [s for s in getattr(run.experiment.data, "sources", ()) if isinstance(s, Walks)]
    if not found or run.tokenizer.kind != "chars":
        raise UserError(f"--parent={run.workdir} has not read random walks letter by letter: see walks_sft")
    return found[0]


def sampler_of(run: Run) -> Sampler:
    return Sampler(run.model, run.tokenizer, CONTEXT, WALK, slots=64)


def _scores(task: Walks, found: Sequence[Sample]) -> list[float]:
    return [walks.optimality(task, x.prompt.asked + x.reply.message.text) for x in found]


def judged(run: Run, params, task: Walks, load: Load) -> dict[str, float]:
    """Mean optimality of walks from every start, at random and by the likeliest node; the same draws for everyone."""
    asked = prompts.heldout(Prompts(task=task, context=CONTEXT), task.nodes)
    seed = rollout.seed_of(0, rng.EVAL, 0)
    at_random = rollout.sample(sampler_of(run), params, asked, load.judged, 1.0, seed)
    greedy = rollout.sample(sampler_of(run), params, asked, 1, 0.0, seed)
    return {"score": float(np.mean(_scores(task, at_random))), "greedy": float(np.mean(_scores(task, greedy)))}


def paired_walks(task: Walks, found: Sequence[Sample]) -> list[dict[str, str]]:
    """Pairs of neighbors from one start that differ in optimality, the better one chosen: the shorter, or the one that
    comes to the goal. Walks that were cut off are left out."""
    pairs = []
    scored = [(x, s) for x, s in zip(found, _scores(task, found)) if x.ended and x.reply.message.text]
    for (a, first), (b, second) in zip(scored[::2], scored[1::2]):
        if a.place == b.place and first != second:
            better, worse = (a, b) if first > second else (b, a)
            texts = {"chosen": better.reply.message.text, "rejected": worse.reply.message.text}
            pairs.append({"prompt": a.prompt.asked} | texts)
    return pairs


def tossed(pairs: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The same pairs, the order of each decided by a coin."""
    coins = np.random.default_rng(0).integers(0, 2, len(pairs))
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    return [{swapped.get(k, k): v for k, v in p.items()} if coin else dict(p) for p, coin in zip(pairs, coins)]


def training_pairs(e: Experiment) -> list[dict[str, str]]:
    """Those of the definition's pairs that our side trains on."""
    (source,) = e.data.sources
    kept, _ = preference_sources.split(source, preference_sources.read(source), e.data.valid_fraction)
    return [{"prompt": p.prompt, "chosen": p.answers[0].text, "rejected": p.answers[1].text} for p in kept]


def prompts_in_order(e: Experiment) -> list[str]:
    """What a GRPO run asks, rollout by rollout."""
    count = e.train.steps * (e.train.batch_size // e.objective.samples)
    return [prompts.at(e.data, "train", e.seed, i).asked for i in range(count)]
