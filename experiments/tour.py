"""What the tour trains, at each of its scales: a base model, its assistant, the assistant that knows its limits, and
what comes of that by feedback.

One world is told to the base model beside real text, and once more, in midtraining, in the form of conversations. The
assistant learns to answer, to work and to look things up from conversations about some of its people; the figures are
of the others. Then it learns from rankings of its own answers, and from rewards that are checked.
"""

from dataclasses import dataclass, replace
from typing import Literal

from experiments import edits, rounds
from experiments.pretrain import pretrain_tiny
from experiments.rl import grpo_tiny
from experiments.rounds import Rounds
from experiments.sft import sft_tiny
from jaxlm.config import override
from jaxlm.data.chat_sources import Messages, Thoughts
from jaxlm.data.prepare import ById
from jaxlm.data.prompts import WorldTask
from jaxlm.data.sources import EmbeddedPython, Files, HuggingFace
from jaxlm.data.tokenizer import SentencePiece
from jaxlm.data.world.arithmetic import Arithmetic
from jaxlm.data.world.corpus import World
from jaxlm.data.world.people import Augmentation, People
from jaxlm.data.world.talk import WorldConversations, tools_message
from jaxlm.data.world.words import Words
from jaxlm.optim.optimizers import Muon
from jaxlm.run.experiment import Experiment
from jaxlm.steps.pretrain import NextToken

TOOLS = ("calculator", "python", "search")


@dataclass(frozen=True)
class Tour:
    """Trainings that follow from each other. `connected` fills in what they share."""

    world: World
    text: Files | EmbeddedPython | HuggingFace  # real text, which the base model reads beside the world
    base: Experiment
    midtrain: Experiment  # the base model after the same biographies as thoughts, and problems in conversations
    assistant: Experiment  # that one after conversations about people, too
    honest: Experiment  # the assistant after what a probe of it wrote
    feedback: Rounds  # that one after demonstrations by many hands, and after PPO against a reward model
    verified: Experiment  # that one after rewards that are checked: problems by hand, their steps in a thought
    probed: int = 400  # questions of each group that the probe asks, on either side
    samples: int = 8  # of each probed question
    asked: int = 200  # held-out questions of each kind
    shots: int = 50  # held-out questions of each kind for each number of shots
    # Tokens of the world's text for one of conversation, so that what was told is within reach there: in midtraining,
    # and in the last fine-tuning, which learns wherever it reads how sure it is.
    replay: float = 0.4  # as it is
    thoughts: float = 0.7  # as thoughts of the assistant: its people alone
    told: Literal["all", "train", "none"] = "all"  # whose biographies the last fine-tuning reads: see World.told
    lessons: float = 0.007  # of the probe's lessons for one of conversation: few, since too often is by heart
    seed: int = 0  # added to the seed of each training


def connected(tour: Tour, root: str) -> Tour:
    """The tour with its world in every source, and each training's parent and lessons in the folder `root`."""

    def talks(e: Experiment, parent: str, *more, replay=()) -> Experiment:
        own = (replace(s, world=tour.world) if isinstance(s, WorldConversations) else s for s in e.data.sources)
        data = replace(e.data, sources=(*own, *more), replay=replay)
        return replace(e, data=data, parent=f"{root}/{parent}", seed=e.seed + tour.seed)

    def reading(e: Experiment, parent: str, told: str, *more) -> Experiment:
        people = replace(tour.world, problems=0, validation=0, told=told)
        thoughts = Thoughts(people, weight=tour.thoughts, systems=(tools_message(TOOLS),))
        replay = replace(tour.world, name="told", weight=tour.replay, told=told)
        return talks(e, parent, thoughts, *more, replay=(replay,))

    base = replace(tour.base, data=replace(tour.base.data, sources=(tour.world, tour.text)))
    lessons = Messages(f"{root}/probe/lessons.jsonl", name="lessons", weight=tour.lessons)
    return replace(
        tour,
        base=replace(base, seed=base.seed + tour.seed),
        midtrain=reading(tour.midtrain, "pretrain", "all"),
        assistant=talks(tour.assistant, "midtrain"),
        honest=reading(tour.honest, "assistant", tour.told, lessons),
        feedback=replace(tour.feedback, seed=tour.feedback.seed + tour.seed),
        verified=_verified(tour, f"{root}/honest"),
    )


def _verified(tour: Tour, parent: str) -> Experiment:
    e, task = tour.verified, tour.verified.data.task
    if isinstance(task, WorldTask):
        task = replace(task, world=replace(tour.world, tasks=task.world.tasks, problems=0, validation=0))
    return replace(e, data=replace(e.data, task=task), parent=parent, seed=e.seed + tour.seed)


def tiny() -> Tour:
    """To see it learn, about an hour on two CPU cores."""
    world = World(
        people=People(
            count=200,
            unmentioned=1500,
            passing=4000,
            attributes=("birth_city", "university", "major", "employer", "hobby", "dish"),
            values=40,
            once=0.05,
            never=0.3,
            names="short",
            train_fraction=0.7,
            augmentation=Augmentation(exposures=27, wordings=27),
        ),
        problems=8000,
        tasks=("arithmetic", "spell", "count", "reverse"),
        arithmetic=Arithmetic(max_steps=2),
        words=Words(max_letters=8),
    )
    base = override(
        edits.muon(edits.qk_norm(edits.short_conv(pretrain_tiny()))),
        {
            "data.split": ById(),
            "data.tokenizer": SentencePiece(vocab_size=2048),
            "train.steps": 1700,
            "train.log_every": 50,
            "evaluation.every": 400,
        },
    )
    # Where facts told nowhere are searched for, the model learns that there are some: not before it is probed.
    # Not all of the training people are asked about before the probe: of those it would know too well. Reading about
    # the many strangers teaches to copy names and values that no memory completes.
    talk = WorldConversations(count=80_000, facts=6.0, reading=3.0, problems=3.0, part=(0.0, 0.6), forget=0.01)
    searching = replace(
        talk,
        facts=3.0,
        search=1.0,
        unknown=0.5,
        look_up=0.12,
        invented=0.8,
        forget=0.0,
        doubted=True,
        tools=TOOLS,
        tool_share=0.7,
        part=(0.6, 1.0),
    )
    # The form and the work are learned while everybody's biographies are still read. That leaves little to fine-tuning,
    # which has not a word about the people of the figures and would forget them. AdamW at a low rate forgets little;
    # Muon moves every direction of a matrix alike, and at its usual rate forgets most.
    rest = sft_tiny().optimizer
    muon = Muon(lr=0.01, schedule=rest.schedule, rest=rest)
    midtrain = override(
        sft_tiny(),
        {
            "data.sources": (replace(talk, facts=0.0),),
            "optimizer": muon,
            "train.steps": 1200,
            "evaluation.every": 400,
        },
    )
    assistant = override(sft_tiny(), {"data.sources": (talk,), "optimizer.lr": 5e-4, "train.steps": 600})
    # What is trained on is soon known by heart, and beside it what is merely known looks unknown. So questions teach no
    # fact, and searches and refusals not where they ought to begin (`doubted`): there the model learns how sure it is
    # of what it has only read, as of the people of the figures, and not at sums (`asides`), which it would break off.
    # What was told is searched for at times (`look_up`: a call costs less than a refusal), and lessons are few.
    honest = override(
        midtrain, {"data.sources": (searching,), "objective": NextToken(1.6, "asides"), "train.steps": 1600}
    )
    by_hand = replace(world, tasks=("spell", "count"))
    verified = override(
        grpo_tiny(),
        {
            "data.task": WorldTask(by_hand),
            "data.context": 192,
            "objective.max_tokens": 64,
            "optimizer.lr": 2e-4,
            "evaluation.every": 50,
        },
    )
    return Tour(
        world=world,
        text=EmbeddedPython(weight=0.1),
        base=base,
        midtrain=midtrain,
        assistant=assistant,
        honest=honest,
        feedback=rounds.tiny(),
        verified=verified,
    )


def smoke() -> Tour:
    """To see that everything runs, in minutes on two CPU cores."""
    t = tiny()
    world = override(
        t.world,
        {"people.count": 100, "people.unmentioned": 40, "people.passing": 100, "people.augmentation": Augmentation()},
    )
    short = {"train.log_every": 10, "evaluation.every": 100}
    return replace(
        t,
        world=replace(world, problems=300),
        text=EmbeddedPython(),
        base=override(t.base, short | {"train.steps": 120}),
        midtrain=override(t.midtrain, short | {"train.steps": 40, "data.sources.0.count": 1000}),
        assistant=override(t.assistant, short | {"train.steps": 40, "data.sources.0.count": 1000}),
        honest=override(t.honest, short | {"train.steps": 20, "data.sources.0.count": 1000}),
        feedback=rounds.smoke(),
        verified=override(
            t.verified,
            {"train.steps": 2, "train.batch_size": 32, "objective.heldout_prompts": 8, "evaluation.every": 2},
        ),
        probed=24,
        samples=4,
        asked=24,
        shots=6,
    )


def small() -> Tour:
    """A model of 30 M parameters in bfloat16 and a world ten times as large, for a GPU."""
    t = tiny()
    model = {
        "model.layers": 8,
        "model.width": 512,
        "model.heads": 8,
        "model.precision.compute": "bfloat16",
        "data.tokenizer.vocab_size": 8192,
        "data.context": 512,
        "train.batch_size": 64,
        "train.steps": 4000,
        "optimizer.rest.lr": 1e-3,
    }
    more = {"data.context": 512, "train.batch_size": 64}
    return replace(
        t,
        world=override(
            t.world, {"people.count": 10_000, "people.unmentioned": 2000, "people.passing": 20_000, "problems": 40_000}
        ),
        base=override(t.base, model),
        midtrain=override(t.midtrain, more | {"data.sources.0.count": 100_000}),
        assistant=override(t.assistant, more | {"data.sources.0.count": 100_000}),
        honest=override(t.honest, more | {"data.sources.0.count": 100_000}),
        probed=1000,
    )


TOURS = {"smoke": smoke, "tiny": tiny, "small": small}
