"""What training needs to know of each objective: one table, a line an objective.

These learn from rows that are there before the run. An objective whose rows come from its own policy needs a driver
that samples them, beside `train.py`.
"""

import dataclasses
import os
from collections.abc import Callable

import jax

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.chat import Chat
from jaxlm.data.preferences import Preferences
from jaxlm.data.prepare import Data
from jaxlm.data.prompts import Prompts
from jaxlm.feedback import parts
from jaxlm.nn import flops, lora
from jaxlm.nn.definition import padded_vocab
from jaxlm.run import checkpoint, load, reward
from jaxlm.run.experiment import Experiment
from jaxlm.steps import distill, preference, pretrain, ranked
from jaxlm.steps import reward as ranking
from jaxlm.steps.distill import Distill
from jaxlm.steps.policy import Critic, PolicyGradient
from jaxlm.steps.preference import Preference
from jaxlm.steps.pretrain import NextToken
from jaxlm.steps.reward import RewardModel


@dataclasses.dataclass(frozen=True)
class Task:
    """An objective's side of training. `reference` is (model, parameters) of another run, None where there is none.

    data: the kinds that it learns from. loss: (objective, model, train, reference) -> loss of the update contract.
    sums: (objective, model, chunk, reference, params, batch, token_bytes) -> sums over a batch. The floats of the
    objective may be traced. summarize: of a set's sums, {name: value}, of which "loss" decides which checkpoint is
    best, and `unit` what it is. finish: (experiment, mesh, params, validation sets, workdir, step), once training is
    done.
    """

    data: tuple[type, ...]
    loss: Callable
    sums: Callable
    summarize: Callable[[dict], dict[str, float]]
    unit: str = "nats per token"
    finish: Callable | None = None


TASKS: dict[type, Task] = {
    NextToken: Task(
        data=(Data, Chat),
        loss=lambda objective, model, train, reference: pretrain.make_loss(objective, model, train),
        sums=lambda objective, model, chunk, reference, *rest: pretrain.evaluation_sums(model, chunk, *rest),
        summarize=pretrain.summarize,
    ),
    RewardModel: Task(
        data=(Preferences,),
        loss=lambda objective, model, train, reference: ranking.make_loss(objective, model),
        sums=lambda objective, model, chunk, reference, params, batch, token_bytes: ranking.evaluation_sums(
            objective, model, params, batch
        ),
        summarize=ranked.summarize,
        unit="nats per prompt",
        finish=reward.write_scale,
    ),
    Preference: Task(
        data=(Preferences,),
        loss=preference.make_loss,
        sums=lambda *arguments: preference.evaluation_sums(*arguments[:-1]),
        summarize=ranked.summarize,
        unit="mean over prompts",
    ),
    Distill: Task(data=(Data, Chat), loss=distill.make_loss, sums=distill.evaluation_sums, summarize=distill.summarize),
}


def task(e: Experiment) -> Task:
    return TASKS[type(e.objective)]


def data_kinds(e: Experiment) -> tuple[type, ...]:
    """What the objective learns from."""
    return (Prompts,) if isinstance(e.objective, PolicyGradient) else task(e).data


# ---------------------------------------------------------------------------------------------------- where it began
def origins(e: Experiment) -> dict[str, str]:
    """Workdirs whose parameters the run reads, by what they are to it: its parent, its teacher, its critic's start."""
    teacher = e.objective.teacher if isinstance(e.objective, Distill) else None
    critic = None
    if isinstance(e.objective, PolicyGradient) and isinstance(e.objective.critic, Critic):
        critic = e.parent if e.objective.critic.run is None else e.objective.critic.run
    found = {"parent": e.parent, "teacher": teacher, "critic": critic}
    return {what: workdir for what, workdir in found.items() if workdir is not None}


def check_there(e: Experiment) -> None:
    """Raises `UserError` for a run that the definition names and that is not there, with the settings that name it."""
    settings = {"parent": e.parent}
    if isinstance(e.objective, Distill):
        settings["objective.teacher"] = e.objective.teacher
    if isinstance(e.objective, PolicyGradient):
        learned = {i: part.run for i, part in enumerate(e.objective.reward) if isinstance(part, parts.Learned)}
        settings |= {f"objective.reward.{i}.run": run for i, run in learned.items()}
        settings["objective.critic.run"] = getattr(e.objective.critic, "run", None)
    for workdir in filter(None, settings.values()):
        if not storage.path(workdir).is_dir():
            given = " ".join(f"--set={path}=WORKDIR" for path, named in settings.items() if named == workdir)
            raise UserError(f"no such workdir: {workdir}; name the run to take with {given}")


def validate(e: Experiment) -> None:
    """Raises `UserError` where the objective cannot learn from this data, or lacks the run that it learns against."""
    kinds, name = data_kinds(e), type(e.objective).__name__
    if not isinstance(e.data, kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise UserError(f"objective {name} learns from {wanted}, and data is {type(e.data).__name__}")
    if e.lora is not None and e.parent is None:
        raise UserError("lora trains adapters of a model that has learned, its parent: --set=parent=WORKDIR")
    if isinstance(e.objective, NextToken) and e.objective.doubt is not None and e.objective.doubt <= 0:
        raise UserError(f"objective.doubt must be above 0, or none for no such loss, got {e.objective.doubt}")
    if isinstance(e.objective, NextToken) and e.objective.doubt is None and e.objective.doubt_in != "thoughts":
        raise UserError(f"objective.doubt_in={e.objective.doubt_in} is of doubt: set objective.doubt as well")
    if isinstance(e.objective, Preference) and preference.needs_reference(e.objective) and e.parent is None:
        raise UserError(f"{type(e.objective.loss).__name__} needs the policy that it starts from: --set=parent=WORKDIR")
    for what, workdir in origins(e).items():
        theirs = load.load_experiment(workdir).heads
        if "lm" not in theirs and what != "critic" and (what == "teacher" or "lm" in e.heads):
            raise UserError(f"{what} {workdir} is a {theirs[0]} model, which predicts no tokens")


def check_tokenizers(e: Experiment, tokenizer) -> None:
    """Raises `UserError` where ids would not mean what they are taken for: another run's tokens, or symbols."""
    for what, workdir in origins(e).items():
        if tokenizers.load(storage.path(workdir) / "tokenizer").hash != tokenizer.hash:
            raise UserError(f"data.tokenizer is not that of {what} {workdir}; --set=data.tokenizer=none takes it")
    symbols = "<think>", "</think>", "<|im_end|>"
    thoughts = all(tokenizer.control.get(name) == tokenizers.CONTROL[name] for name in symbols)
    if isinstance(e.objective, NextToken) and e.objective.doubt is not None and not thoughts:
        raise UserError("objective.doubt is learned in thoughts, and this tokenizer has no symbols for them")


# (workdir, step) -> a step that this process has hashed, and how its files looked then.
_hashed: dict[tuple[str, int | None], tuple[checkpoint.Saved, dict | None]] = {}


def _look(folder) -> dict | None:
    """What of its files changes when they do; None where that cannot be said: on object storage, where no time is told
    so finely, and where its run prunes the step right now."""
    if not storage.is_local(folder):
        return None
    try:
        stats = {name: os.stat(p) for name, p in storage.files(folder).items()}
    except FileNotFoundError:
        return None
    return {name: (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats.items()}


def _saved(workdir, step: int | None = None) -> checkpoint.Saved:
    """`checkpoint.saved`, which hashes no step that it has hashed in this process and whose files look as they did."""
    key = os.path.abspath(workdir) if storage.is_local(workdir) else str(workdir)
    had, looked = _hashed.get((key, step), (None, None))
    if looked is not None and had.folder.is_dir() and _look(had.folder) == looked:
        return had
    found = checkpoint.saved(workdir, step)
    _hashed[key, found.step] = found, _look(found.folder)
    return found


def origin_records(e: Experiment) -> dict[str, dict]:
    """What lineage.json says of each: its newest checkpoint, by step and hash, and the hashes of its data."""
    out = {}
    for what, workdir in origins(e).items():
        found = _saved(workdir)
        out[what] = {"step": found.step, "checkpoint": found.sha256, "hashes": found.metadata.get("hashes", {})}
    return out


def read_reference(e: Experiment, mesh, records: dict):
    """(model, parameters) that the objective learns against, as lineage.json recorded them; None where there is none.

    Parameters None: those of the run itself without its adapters. Otherwise they are read once more, for the run's
    own are donated step by step. `UserError` when the checkpoint is no longer there, or is another one.
    """
    if isinstance(e.objective, Preference) and preference.needs_reference(e.objective):
        what = "parent"
        if e.lora is not None:
            return e.model, None
    elif isinstance(e.objective, Distill):
        what = "teacher"
    else:
        return None
    theirs, params = read_origin(e, what, mesh, records)
    if what == "teacher":
        return theirs.model, params
    return e.model, jax.tree.map(lambda x: x.astype(e.model.precision.params), params)


def read_origin(e: Experiment, what: str, mesh, records: dict):
    """(bound definition, parameters) of an origin, at the checkpoint that lineage.json recorded; never another."""
    workdir, step = origins(e)[what], records[what]["step"]
    found = _saved(workdir, step)
    if found.sha256 != records[what]["checkpoint"]:
        raise UserError(f"checkpoint {step} of {what} {workdir} is not the one that this run began with")
    theirs = load.load_bound(workdir)
    return theirs, load.read_params(found, theirs, mesh)


def flops_per_token(e: Experiment, reference) -> float:
    """Of an update: the training of the model, without logits that are never made, and a pass of the reference."""
    count = lora.flops_per_token(e.model, e.lora, e.data.context)["train"]
    if "lm" not in e.heads:  # with adapters its kernel would have had no gradient
        count -= (6.0 if e.lora is None else 4.0) * padded_vocab(e.model) * e.model.width
    if reference is not None:
        count += flops.flops_per_token(reference[0], e.data.context)["forward"]
    return count
