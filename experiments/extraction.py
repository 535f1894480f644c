"""What launch.extraction trains: base models that read the same facts told in different ways, then learn to answer.

After "Physics of Language Models: Part 3.1" (Allen-Zhu and Li 2023, arXiv 2309.14316), in miniature.
"""

from dataclasses import dataclass, replace

from experiments.tour import tiny
from jaxlm.config import UserError, override
from jaxlm.data.world.corpus import World
from jaxlm.data.world.people import AUGMENTATIONS, Augmentation, People
from jaxlm.data.world.talk import WorldConversations
from jaxlm.run.experiment import Experiment


@dataclass(frozen=True)
class Extraction:
    """One arm of the experiment is an augmentation and a seed; everything here is the same in all of them."""

    people: People  # their augmentation is that of the arm
    base: Experiment  # reads their biographies and nothing else
    tuned: Experiment  # answers questions about half of them
    exposures: int = 5  # biographies of each person
    replay: bool = True  # half of the fine-tuning goes on with the biographies, as they were told
    asked: int = 300  # facts of the persons of each side, at most


@dataclass(frozen=True)
class Arm:
    """An augmentation with a seed, which is that of the world, too. tuned: by whether it recollects before it tells."""

    world: World
    base: Experiment
    tuned: dict[bool, Experiment]


def small() -> Extraction:
    """About four minutes an arm on two CPU cores: 300 persons, 1 M parameters."""
    t = tiny()
    short = {"train.batch_size": 16, "data.context": 128, "train.log_every": 50}
    everything = {"once": 0.0, "never": 0.0, "train_fraction": 0.5, "augmentation": Augmentation()}
    return Extraction(
        people=replace(t.world.people, count=300, unmentioned=0, passing=0, **everything),
        base=override(t.base, short | {"train.steps": 1000, "evaluation.every": 500}),
        # No midtraining comes before it: the form of conversations is learned here, as the tour learns it there.
        tuned=override(
            t.midtrain, short | {"train.steps": 300, "evaluation.every": 150, "data.sources.0.count": 20_000}
        ),
    )


def arm(x: Extraction, augmentation: str, seed: int, root: str) -> Arm:
    """The trainings of one arm, whose run directories are in the folder `root`."""
    if x.people.augmentation != Augmentation():
        raise UserError("people.augmentation is each arm's own: choose with --augmentations, and --set=exposures=N")
    people = replace(x.people, augmentation=replace(AUGMENTATIONS[augmentation], exposures=x.exposures))
    world = World(seed=seed, people=people)
    only_facts = {"facts": 1.0, "problems": 0.0, "identity": 0.0, "system": 0.0}
    settings = only_facts | {"tools": (), "tool_share": 0.0, "turns": 1, "count": x.tuned.data.sources[0].count}

    def tuned(recollect: bool) -> Experiment:
        talk = WorldConversations(world=world, recollect=recollect, **settings)
        data = replace(x.tuned.data, sources=(talk,), replay=(replace(world, name="told"),) if x.replay else ())
        return replace(x.tuned, data=data, parent=f"{root}/base", seed=x.tuned.seed + seed)

    base = replace(x.base, data=replace(x.base.data, sources=(world,)), seed=x.base.seed + seed)
    return Arm(world, base, {recollect: tuned(recollect) for recollect in (True, False)})
