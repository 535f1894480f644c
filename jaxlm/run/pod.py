"""Every stage of an experiment as a program to be compiled for devices that are not here, on shapes alone.

The programs are those that training calls, lowered for `jax.ShapeDtypeStruct`s whose shardings the table of
`sharding.py` gives. What stays on the devices beside a program's own arguments is listed with it: a PPO update shares
them with the reference, the critic and the reward model.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from jaxlm import sharding, storage
from jaxlm.config import UserError
from jaxlm.data import loader
from jaxlm.data.preferences import Preferences
from jaxlm.data.tokenizer import Bytes, BytesTokenizer, Saved, SentencePiece
from jaxlm.data.tokenizer import load as load_tokenizer
from jaxlm.feedback import parts
from jaxlm.nn import flops, heads, lora
from jaxlm.nn.definition import ModelConfig, padded_vocab
from jaxlm.nn.transformer import validate as validate_model
from jaxlm.run import load, objectives, reward, rl, train
from jaxlm.run.experiment import Experiment, validate
from jaxlm.run.roofline import Work
from jaxlm.sample import engine, slots
from jaxlm.steps import learn, policy, preference, state
from jaxlm.steps.distill import Distill
from jaxlm.steps.policy import Critic, PolicyGradient
from jaxlm.steps.preference import Preference
from jaxlm.steps.rollout import row_count

STOPS = 4  # stop ids a request, at most


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program. given, beside: {kind: trees} of its arguments, and of what else stays on the devices meanwhile;
    kinds are parameters, optimizer, cache and batch. donated: what it updates in place."""

    name: str
    about: str
    lower: Callable[[], jax.stages.Lowered]
    given: dict[str, object]
    beside: dict[str, object]
    donated: object
    work: Work


# --------------------------------------------------------------------------------------------------- the definition
def bound(e: Experiment) -> Experiment:
    """The definition with its model and vocabulary, of which nothing needs to have been trained.

    A parent that is there gives both, as in training. `UserError` says what is missing.
    """
    if e.parent is not None and not (storage.path(e.parent) / "config.json").exists():
        e = dataclasses.replace(e, parent=None)
    if e.parent is not None:
        parent = load.load_bound(e.parent)
        model = parent.model if e.model is None else e.model
        return dataclasses.replace(e, model=dataclasses.replace(model, vocab_size=parent.model.vocab_size))
    if e.model is None:
        raise UserError("the definition leaves its model to a parent, and there is none: --model=SIZE gives it one")
    if e.model.vocab_size is None:
        e = dataclasses.replace(e, model=dataclasses.replace(e.model, vocab_size=_vocabulary(e.data.tokenizer)))
    return e


def _vocabulary(tokenizer) -> int:
    match tokenizer:
        case SentencePiece(vocab_size=size):
            return size
        case Saved(path=path):
            return load_tokenizer(path).vocab_size
        case Bytes():
            return BytesTokenizer().vocab_size
    raise UserError("the vocabulary's size is not known without the data: --set=model.vocab_size=N")


def check(e: Experiment, mesh) -> None:
    """Raises `UserError` for a bound definition that could not run on the mesh."""
    validate(e, mesh.shape["replica"] * mesh.shape["fsdp"])
    if isinstance(e.objective, PolicyGradient):
        policy.validate(e.objective, e.train.batch_size)
    validate_model(e.model)
    lora.validate(e.model, e.lora)


def _model_of(workdir: str | None, e: Experiment) -> ModelConfig:
    """Of another run, where it has begun; until then it is taken to have the experiment's own."""
    if workdir is None or not (storage.path(workdir) / "config.json").exists():
        return e.model
    return load.load_bound(workdir).model


def _parameters(model: ModelConfig, names: tuple[str, ...], mesh):
    shapes = heads.abstract(model, None, names)
    where = sharding.tree_shardings(mesh, heads.specs(model, None, names), shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


# ------------------------------------------------------------------------------------------------------- the stages
def stages(e: Experiment, mesh) -> list[Stage]:
    """Those of a bound definition, in the order in which a run meets them."""
    return _reinforced(e, mesh) if isinstance(e.objective, PolicyGradient) else _from_rows(e, mesh)


def _from_rows(e: Experiment, mesh) -> list[Stage]:
    s = state.abstract(e.model, e.optimizer, mesh, e.lora, e.heads)
    answers = e.data.answers if isinstance(e.data, Preferences) else 0
    batch = loader.described(e.train.batch_size, e.data.context + 1, answers, mesh)
    reference = None
    if isinstance(e.objective, Distill):
        model = _model_of(e.objective.teacher, e)
        reference = model, _parameters(model, heads.LM, mesh)
    elif isinstance(e.objective, Preference) and preference.needs_reference(e.objective):
        reference = e.model, None if e.lora is not None else _parameters(e.model, heads.LM, mesh)
    step = train.step_function(e, mesh, reference)
    kept = s.params if reference is None else (s.params, reference[1])
    tokens = e.train.batch_size * e.data.context
    work = _update(e.model, e, tokens, objectives.flops_per_token(e, reference) * tokens, e.data.context, e.heads)
    held = {"parameters": kept, "optimizer": s.opt_state, "batch": batch}
    about = f"{e.train.batch_size} rows of {e.data.context} tokens, {e.train.accumulation} microbatches"
    out = [Stage("train", about, lambda: step.lower(s, batch), held, {}, s, work)]
    if "lm" in e.heads:
        B = max(engine.MAX_SLOTS, engine.bucket(_shards(mesh)))
        half = e.data.context // 2
        params, beside = _acting(e, s, mesh)
        out += _sampling(e.model, mesh, params, beside | {"optimizer": s.opt_state}, B, half, half)
    return out


def _acting(e: Experiment, s, mesh):
    """(the parameters that sample, what they leave beside them): with adapters a merged copy."""
    if e.lora is None:
        return s.params, {}
    return _parameters(e.model, heads.LM, mesh), {"parameters": s.params}


def _shards(mesh) -> int:
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def _update(model, e: Experiment, tokens: int, count: float, length: int, names) -> Work:
    return Work(
        model, count, tokens // e.train.accumulation, e.train.accumulation, length, update=True, logits="lm" in names
    )


def _forward(model, tokens: int, length: int, logits: bool = True, scored: int | None = None) -> Work:
    """scored: tokens whose logits are made, where it is not all of them."""
    each = flops.flops_per_token(model, length)["forward"]
    kernel = 2.0 * padded_vocab(model) * model.width
    count = each * tokens - kernel * (tokens - (scored if scored is not None else tokens if logits else 0))
    return Work(model, count, tokens, 1, length, update=False, logits=logits)


def _sampling(model, mesh, params, beside: dict, B: int, prompt: int, longest: int, samples: int = 1) -> list[Stage]:
    """The decoder's two large programs: some prompts fed at once, and one token for every slot.

    Of parameters with their layers stacked, as a TPU decodes with them; elsewhere `engine.laid_out` takes them apart
    first, and a step reads less. samples: of each prompt.
    """
    shape = {"B": B} | engine.sizes(longest, STOPS, prompt + longest)
    s = slots.described(model, mesh, **shape)
    P, T = engine.prompt_rows(B, samples, 1, _shards(mesh)), engine.bucket(prompt, engine.MIN_PROMPT_BUCKET)
    ints = jax.ShapeDtypeStruct((P,), np.int32)
    one = jax.ShapeDtypeStruct((), np.int32)
    held = {"parameters": params, "cache": s}

    def prefill():
        tokens = jax.ShapeDtypeStruct((P, T), np.int32)
        with jax.set_mesh(mesh):
            return slots.prefill.lower(model, params, s, ints, tokens, ints, ints)

    def decode():
        with jax.set_mesh(mesh):
            return slots.decode.lower(model, params, s, jax.ShapeDtypeStruct((B,), np.bool_), one, one)

    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(s.cache))
    step = dataclasses.replace(_forward(model, B, shape["capacity"]), cache=float(cache))
    about = f"{B} slots of {shape['capacity']} tokens"
    return [
        Stage(
            "prefill", f"{P} prompts of {T} tokens", prefill, held, beside, None, _forward(model, P * T, T, scored=P)
        ),
        Stage("decode", f"one token in each of {about}", decode, held, beside, s, step),
    ]


# -------------------------------------------------------------------------------------------- reinforcement learning
def _reinforced(e: Experiment, mesh) -> list[Stage]:
    p: PolicyGradient = e.objective
    critic_model = _model_of(p.critic.run or e.parent, e) if isinstance(p.critic, Critic) else None
    s = learn.abstract(p, e.optimizer, e.model, e.lora, critic_model, mesh)
    models = [_model_of(part.run, e) for part in p.reward if isinstance(part, parts.Learned)]
    rewards = [_parameters(model, ("reward",), mesh) for model in models]
    reference = _parameters(e.model, heads.LM, mesh) if p.reference else None
    frozen = [reference, *rewards]

    def beside(*others) -> dict:
        """What stays besides the policy's parameters, less what a stage is given."""
        critic = [] if s.critic is None else [s.critic]
        states = [s.policy, *critic]
        params = [x.params for x in states] + frozen
        return {
            "parameters": [x for x in params if not any(x is o for o in others)],
            "optimizer": [x.opt_state for x in states if not any(x.opt_state is o for o in others)],
        }

    prompt = max(1, e.data.context - p.max_tokens)
    B = engine.slots_for(e.train.batch_size, p.slots)
    params, merged = _acting(e, s, mesh)
    kept = beside(params)
    if merged:
        kept["parameters"] = [*kept["parameters"], merged["parameters"]]
    out = _sampling(e.model, mesh, params, kept, B, prompt, p.max_tokens, p.samples)

    for i, (model, theirs) in enumerate(zip(models, rewards)):
        rows, T = reward.rows_at_once(mesh), engine.bucket(e.data.context, engine.MIN_PROMPT_BUCKET)
        out.append(_rewarded(f"reward_{i}" if i else "reward", model, theirs, rows, T, mesh, beside(theirs)))

    learner = rl.learner(e, critic_model, mesh)
    # A sequence a row: packing makes fewer, and none is longer.
    cut = p.minibatches * e.train.accumulation
    at_once = row_count(-(-e.train.batch_size // cut), learner.shards)
    batch = learn.described(learner, at_once, credited=False)
    own, length = s.policy, e.data.context
    scored = f"{at_once} rows of {length} tokens"

    def given(params, batch, opt_state=None):
        return {"parameters": params, "batch": batch} | ({} if opt_state is None else {"optimizer": opt_state})

    def lowered(program, *arguments):
        def lower():
            with jax.set_mesh(mesh):
                return program().lower(*arguments)

        return lower

    work = _forward(e.model, at_once * length, length)
    if learner.needs_old:
        about = f"log-probabilities of {scored}"
        run = lowered(lambda: learner.score, s.params, batch)
        out.append(Stage("score", about, run, given(s.params, batch), beside(s.params), None, work))
    if reference is not None and (e.lora is not None or not learner.needs_old):
        about = f"the reference's log-probabilities of {scored}"
        run = lowered(lambda: learner.refer, reference, batch)
        out.append(Stage("refer", about, run, given(reference, batch), beside(reference), None, work))
    rows = row_count(-(-e.train.batch_size // p.minibatches), e.train.accumulation * learner.shards)
    update = learn.described(learner, rows, credited=True)
    about = f"{rows} rows of {length} tokens, {e.train.accumulation} microbatches"
    tokens = rows * length
    if s.critic is not None:
        c, held = s.critic, beside(s.critic.params)
        run = lowered(lambda: learner.evaluate, c.params, batch)
        work = _forward(critic_model, at_once * length, length, logits=False)
        out.append(Stage("values", f"the critic's values of {scored}", run, given(c.params, batch), held, None, work))
        each = (
            flops.flops_per_token(critic_model, length)["train"] - 6.0 * padded_vocab(critic_model) * critic_model.width
        )
        work = _update(critic_model, e, tokens, each * tokens, length, learn.CRITIC)
        held = beside(c.params, c.opt_state)
        run = lambda: learner.improve_critic.lower(c, update)  # noqa: E731
        out.append(Stage("critic", about, run, given(c.params, update, c.opt_state), held, c, work))
    each = lora.flops_per_token(e.model, e.lora, length)["train"]
    work = _update(e.model, e, tokens, each * tokens, length, e.heads)
    held = beside(own.params, own.opt_state)
    run = lambda: learner.improve.lower(own, update)  # noqa: E731
    out.append(Stage("policy", about, run, given(own.params, update, own.opt_state), held, own, work))
    return out


def _rewarded(name: str, model, params, rows: int, T: int, mesh, beside: dict) -> Stage:
    tokens, lengths = jax.ShapeDtypeStruct((rows, T), np.int32), jax.ShapeDtypeStruct((rows,), np.int32)

    def lower():
        with jax.set_mesh(mesh):
            return reward.last_rewards.lower(model, params, tokens, lengths)

    held = {"parameters": params}
    work = _forward(model, rows * T, T, logits=False)
    return Stage(name, f"rewards of {rows} rows of {T} tokens", lower, held, beside, None, work)


def device_bytes(tree) -> int:
    """What the arrays of a tree take on one device."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape")]
    shards = (x.shape if getattr(x, "sharding", None) is None else x.sharding.shard_shape(x.shape) for x in leaves)
    return sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shards, leaves))
