"""From scored samples to a new policy: log-probabilities, credit for each token, then epochs of minibatches.

Everything about a token is kept with its sequence on the host between the phases, so that each epoch packs its
minibatches anew and statistics of the whole batch (whitening, group baselines, advantages) are made before it is cut.
The one gradient step is `update.update`, for the policy and for a critic.

Legend: N sequences, R rows, T row length (context + 1); fields of a batch are [R, T].
"""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import config, masked, sharding
from jaxlm.data.trajectory import Trajectory
from jaxlm.nn import heads, lora
from jaxlm.rl import advantage, kl, rewards
from jaxlm.rl.advantage import Gae
from jaxlm.steps import policy, state, update
from jaxlm.steps.policy import Critic, PolicyGradient, ValueHead
from jaxlm.steps.rollout import Columns, arrange, gathered, layout, place, row_count
from jaxlm.steps.state import TrainState
from jaxlm.steps.update import Train


@flax.struct.dataclass
class RLState:
    """All that a run needs to go on as if it had not stopped. The first two fields are the policy's, under the names
    by which any run's parameters are found.

    updates, updates_skipped: gradient steps of the policy, and those left out. step: rollouts, the place
    among the prompts. skipped: steps without a single finite update. kl_coefficient: of the KL in the reward.
    """

    params: dict
    opt_state: optax.OptState
    updates: jax.Array
    updates_skipped: jax.Array
    step: jax.Array
    skipped: jax.Array
    kl_coefficient: jax.Array
    critic: TrainState | None
    trainable: tuple[str, ...] = flax.struct.field(pytree_node=False)

    @property
    def policy(self) -> TrainState:
        return TrainState(self.params, self.opt_state, self.updates, self.updates_skipped, self.trainable)

    def after(self, s: TrainState, **changes) -> "RLState":
        return self.replace(
            params=s.params, opt_state=s.opt_state, updates=s.step, updates_skipped=s.skipped, **changes
        )


def begin(s: TrainState, critic: TrainState | None, coefficient: float, put) -> RLState:
    """The state before the first rollout. put: makes a scalar a global array."""
    zeros = [put(np.int32(0)) for _ in range(4)]  # four, not one: a donated buffer may appear only once
    return RLState(s.params, s.opt_state, *zeros, put(np.float32(coefficient)), critic, s.trainable)


CRITIC = ("value",)


def abstract(p: PolicyGradient, optimizer, model, adapters, critic_model, mesh) -> RLState:
    """Shapes, dtypes and shardings of the state."""
    s = state.abstract(model, optimizer, mesh, adapters, policy.head_names(p))
    critic = None
    if isinstance(p.critic, Critic):
        critic = state.abstract(critic_model, p.critic.optimizer, mesh, None, CRITIC)

    def put(x):
        return jax.ShapeDtypeStruct((), x.dtype, sharding=sharding.replicated(mesh))

    return begin(s, critic, 0.0, put)


# ----------------------------------------------------------------------------------------------------- the programs
@dataclasses.dataclass(frozen=True)
class Learner:
    """What is compiled once for a run, and what decides it.

    model, critic_model: with the vocabulary bound. train: batch_size counts sequences.
    """

    objective: PolicyGradient
    model: object
    lora: object
    optimizer: object
    critic_model: object
    train: Train
    width: int  # tokens of a row
    seed: int
    mesh: jax.sharding.Mesh

    @property
    def updates(self) -> int:
        """Gradient steps in a step."""
        return self.objective.epochs * self.objective.minibatches

    @property
    def needs_old(self) -> bool:
        """Whether log-probabilities by the policy as it was before the updates are made, and values of its own head."""
        p = self.objective
        shared = isinstance(p.critic, ValueHead)
        return self.updates > 1 or p.kl is not None or p.loss.importance_cap is not None or shared

    @property
    def shards(self) -> int:
        return self.mesh.shape["replica"] * self.mesh.shape["fsdp"]

    @functools.cached_property
    def score(self):
        """(parameters with adapters, batch) -> (log-probabilities, values or None), [R, T - 1], whole everywhere."""

        @functools.partial(jax.jit, out_shardings=sharding.replicated(self.mesh))
        def score(params, batch):
            logprobs, _, values = policy.scored(
                self.model, self.train.loss_chunk, lora.attach(self.lora, params), batch
            )
            return logprobs, values

        return sharding.Program(score, self.mesh)

    @functools.cached_property
    def refer(self):
        """The same of the reference, which has no adapters."""
        return self.score if self.lora is None else dataclasses.replace(self, lora=None).score

    @functools.cached_property
    def evaluate(self):
        """(critic's parameters, batch) -> (values, None)"""

        @functools.partial(jax.jit, out_shardings=sharding.replicated(self.mesh))
        def evaluate(params, batch):
            return policy.values(self.critic_model, params, batch), None

        return sharding.Program(evaluate, self.mesh)

    @functools.cached_property
    def improve(self):
        """(policy's TrainState, batch) -> (TrainState, metrics); the state is donated."""
        p = self.objective
        separate = isinstance(p.critic, Critic)
        cfg = dataclasses.replace(p.loss, value=None) if separate else p.loss
        floats = _floats(cfg)

        def make(floats):
            return policy.make_loss(self.model, self.lora, config.replace_leaves(cfg, floats), self.train.loss_chunk)

        axes = heads.specs(self.model, self.lora, policy.head_names(p))
        target = state.abstract(self.model, self.optimizer, self.mesh, self.lora, policy.head_names(p))
        return self._updating(make, floats, self.optimizer, axes, self.model.precision, target)

    @functools.cached_property
    def improve_critic(self):
        """The same of a separate critic."""
        optimizer = self.objective.critic.optimizer
        value = self.objective.loss.value

        def make(floats):
            return policy.make_value_loss(self.critic_model, floats.get("clip"))

        axes = heads.specs(self.critic_model, None, CRITIC)
        target = state.abstract(self.critic_model, optimizer, self.mesh, None, CRITIC)
        return self._updating(make, _floats(value), optimizer, axes, self.critic_model.precision, target)

    def _updating(self, make, floats, optimizer, axes, precision, target):
        shardings = jax.tree.map(lambda a: a.sharding, target)

        options = sharding.compiler_options(self.mesh)
        out = (shardings, sharding.replicated(self.mesh))

        @functools.partial(jax.jit, donate_argnums=0, out_shardings=out, compiler_options=options)
        def one(s, batch, floats, hyper, total, seed):
            return update.update(make(floats), optimizer, axes, precision, self.train, seed, s, batch, hyper, total)

        hyper = _floats(optimizer)
        total = self.train.steps * self.updates
        return sharding.Program(one, self.mesh, (floats, hyper, total, self.seed))


def _floats(node) -> dict:
    return {k: jnp.asarray(v, jnp.float32) for k, v in update.hyperparameters(node).items()}


@jax.jit
def _token_rewards(scores, old, ref, mask, segments, coefficient):
    divergence = kl.estimate("k1", old, ref, mask)
    return rewards.token_rewards(divergence, scores, mask, segments, coefficient), divergence


@functools.partial(jax.jit, static_argnames="keep_mean")
def _whiten(x, mask, keep_mean=False):
    return masked.whiten(x, mask, keep_mean)


@jax.jit
def _gae(r, values, mask, segments, gamma, lam):
    advantages, returns = advantage.gae(r, values, mask, segments, gamma, lam)
    return advantages, returns, advantage.explained_variance(values, returns, mask)


def described(learner: Learner, rows: int, credited: bool) -> Trajectory:
    """Shapes, dtypes and shardings of so many rows, as sampled, or with what `credit` adds for the updates."""
    p = learner.objective
    types = {"tokens": np.int32, "positions": np.int32, "segments": np.int32, "sampled_by_policy": np.bool_}
    floats = ["rollout_logprobs", "temperature"]
    if credited:
        floats += ["advantages", *(["old_logprobs"] if learner.needs_old else [])]
        floats += ["ref_logprobs"] if p.loss.kl is not None else []
        floats += ["values", "returns"] if isinstance(p.loss.advantage, Gae) else []
    where = sharding.sharding_for(learner.mesh, ("batch", None))
    types |= dict.fromkeys(floats, np.float32)
    return Trajectory(**{k: jax.ShapeDtypeStruct((rows, learner.width), t, sharding=where) for k, t in types.items()})


# -------------------------------------------------------------------------------------------------------- the phases
def _rows_scored(program, params, batch, rows: int, mesh) -> list[np.ndarray | None]:
    """The program's outputs [R, T], of so many rows at a time. Their first column is 0: no first token is scored."""
    cuts = [slice(at, at + rows) for at in range(0, batch.tokens.shape[0], rows)]
    parts = [program(params, place(jax.tree.map(operator.itemgetter(cut), batch), mesh)) for cut in cuts]
    out = []
    for columns in zip(*parts):
        whole = None if columns[0] is None else np.concatenate([np.asarray(c, np.float32) for c in columns])
        out.append(None if whole is None else np.pad(whole, ((0, 0), (1, 0))))
    return out


@dataclasses.dataclass
class Credited:
    """The columns of each sequence, ready to be trained on, and what was seen on the way."""

    columns: list[Columns]
    metrics: dict[str, float]
    kl_N: np.ndarray  # of each sequence to the reference, nats; zeros without one


def credit(
    learner: Learner,
    s: RLState,
    reference,
    columns: Sequence[Columns],
    scores_N: np.ndarray,
    groups_N: np.ndarray,
    process: Sequence[np.ndarray] | None = None,
    timed: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Credited:
    """Log-probabilities, rewards and advantages of scored sequences, by the policy as it is.

    reference: parameters, or None. groups: which sequences are of one prompt. process: rewards [n] of each sequence's
    tokens besides its score. timed: `with timed(part)` is around "old_logprobs", "ref_logprobs" and "values", each of
    which ends with what it has made on the host.
    """
    p, mesh = learner.objective, learner.mesh
    rows = layout([len(c["tokens"]) for c in columns], learner.width)
    # As many rows at a time as an update of this size would take: that fits the memory, and needs no other shape.
    cut = p.minibatches * learner.train.accumulation
    at_once = row_count(-(-len(rows) // cut), learner.shards)
    batch = arrange(columns, rows, -(-len(rows) // at_once) * at_once, learner.width)
    mask, segments = batch.sampled_by_policy, batch.segments
    out = [dict(c) for c in columns]
    metrics: dict[str, float] = {
        "rows": len(rows),
        "row_fill": float((segments > 0).sum() / (len(rows) * mask.shape[1])),
    }

    def keep(name: str, x: np.ndarray) -> np.ndarray:
        for c, values in zip(out, gathered(x, columns, rows)):
            c[name] = values
        return x

    with jax.set_mesh(mesh):
        old, values, ref = batch.rollout_logprobs, None, None
        if learner.needs_old:
            with timed("old_logprobs"):
                old, values = _rows_scored(learner.score, s.params, batch, at_once, mesh)
            keep("old_logprobs", old)
        if reference is not None:
            with timed("ref_logprobs"):
                ref, _ = _rows_scored(learner.refer, reference, batch, at_once, mesh)
            if p.loss.kl is not None:
                keep("ref_logprobs", ref)
        if isinstance(p.critic, Critic):
            with timed("values"):
                values, _ = _rows_scored(learner.evaluate, s.critic.params, batch, at_once, mesh)

    spread = [np.full(len(c["tokens"]), x, np.float32) for c, x in zip(columns, scores_N)]
    score_RT = arrange(
        [{"tokens": c["tokens"], "rewards": x} for c, x in zip(columns, spread)], rows, *mask.shape
    ).rewards
    coefficient = s.kl_coefficient if p.kl is not None else 0.0
    r, divergence = map(
        np.asarray, _token_rewards(score_RT, old, old if ref is None else ref, mask, segments, coefficient)
    )
    if process is not None:
        extra = [{"tokens": c["tokens"], "rewards": x} for c, x in zip(columns, process)]
        r = r + arrange(extra, rows, *mask.shape).rewards * mask
    kl_N = np.array([x.sum() for x in gathered(divergence, columns, rows)], np.float64)
    if p.whiten_rewards:
        r = np.asarray(_whiten(r, mask, keep_mean=True))
    if isinstance(p.loss.advantage, Gae):
        gae = p.loss.advantage
        a, returns, explained = map(np.asarray, _gae(r, values, mask, segments, gae.gamma, gae.lam))
        keep("values", values), keep("returns", returns)
        metrics |= {"value/explained_variance": float(explained), "value/mean": float(values[mask].mean()),
                    "value/return_mean": float(returns[mask].mean())}  # fmt: skip
    else:
        totals = np.array([x.sum() for x in gathered(r, columns, rows)], np.float64)
        each = advantage.of_sequences(p.loss.advantage, totals, groups_N, np.ones(len(columns), bool))
        tokens = [np.where(c["sampled_by_policy"], x, 0).astype(np.float32) for c, x in zip(columns, each)]
        a = arrange(
            [{"tokens": c["tokens"], "advantages": x} for c, x in zip(columns, tokens)], rows, *mask.shape
        ).advantages
    metrics |= {"advantage_std": float(a[mask].std()) if mask.any() else 0.0}
    keep("advantages", np.asarray(_whiten(a, mask)) if p.whiten_advantages else a)
    return Credited(out, metrics, kl_N)


def minibatches(learner: Learner, columns: Sequence[Columns], step: int, epoch: int) -> list:
    """The minibatches of an epoch, numpy rows of one shape: sequences in an order that step and epoch decide."""
    p = learner.objective
    order = np.arange(len(columns))
    if p.minibatches > 1:
        order = np.random.default_rng([learner.seed % 2**64, step, epoch]).permutation(len(columns))
    parts = [[columns[i] for i in part] for part in np.array_split(order, p.minibatches) if len(part)]
    rows = [layout([len(c["tokens"]) for c in part], learner.width) for part in parts]
    count = row_count(max(map(len, rows)), learner.train.accumulation * learner.shards)
    return [arrange(part, r, count, learner.width) for part, r in zip(parts, rows)]


def learn(learner: Learner, s: RLState, columns: Sequence[Columns], step: int) -> tuple[RLState, dict]:
    """The epochs of a step: (state, metrics), metrics as scalars, means over the updates.

    `first/` is the first update's ratio, which must be 1 to rounding; `last/` the KL at the end of the rollout's use.
    Most metrics are read here: on the device their means would be a hundred small programs. The state's policy and
    critic are donated.
    """
    seen, seen_critic, skipped = [], [], int(s.updates_skipped)
    own, critic = s.policy, s.critic
    with jax.set_mesh(learner.mesh):
        for epoch in range(learner.objective.epochs):
            for batch in minibatches(learner, columns, step, epoch):
                batch = place(batch, learner.mesh)
                own, metrics = learner.improve(own, batch)
                seen.append(metrics)
                if critic is not None:
                    critic, metrics = learner.improve_critic(critic, batch)
                    seen_critic.append(metrics)
        seen, seen_critic = jax.device_get((seen, seen_critic))
        out = {k: sum(m[k] for m in seen) / len(seen) for k in seen[0]}
        out |= {
            "first/ratio_deviation_max": seen[0]["ratio_deviation_max"],
            "last/approximate_kl": seen[-1]["approximate_kl"],
        }
        for name in ("value", "clip_fraction", "gradient_norm", "learning_rate") if seen_critic else ():
            out[f"critic/{name}"] = sum(m[name] for m in seen_critic) / len(seen_critic)
        out |= {} if critic is None else {"critic/updates_skipped": critic.skipped}
        lost = s.skipped + (own.skipped - skipped == len(seen))
        s = s.after(own, critic=critic, step=s.step + 1, skipped=lost)
    return s, out | {"skipped": s.skipped, "updates_skipped": own.skipped}


def controlled(learner: Learner, s: RLState, kl_N: np.ndarray) -> RLState:
    """The state with the coefficient of the KL in the reward for the next step."""
    controller = learner.objective.kl
    if controller is None or not len(kl_N):
        return s
    observed = np.float32(kl_N.mean())
    return s.replace(kl_coefficient=kl.next_coefficient(controller, s.kl_coefficient, observed, np.float32(len(kl_N))))
