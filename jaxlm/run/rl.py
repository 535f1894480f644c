"""A run of reinforcement learning from its definition: the policy samples, is scored, and learns, step by step.

The loop, the run directory, the checkpoints and the exit codes are those of `train.py`. What a step does to the state
follows from the state, the definition and the parents alone, so a run that was interrupted in the middle of a rollout
does that rollout again and comes out the same; what tools and foreign functions said in it stands in `journal.jsonl`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import broadcast, rng, sharding, storage
from jaxlm.config import UserError
from jaxlm.data import prompts
from jaxlm.feedback import journal as journals
from jaxlm.feedback import parts, shaping
from jaxlm.nn import heads, lora, transformer
from jaxlm.rl import advantage, kl
from jaxlm.run import goodput, lineage, loop, objectives, reward, rl_evals, rl_metrics, rl_plots, train
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.exits import EXIT_PREEMPTED, Abandoned
from jaxlm.run.experiment import Experiment, prepared, validate
from jaxlm.run.goodput import Clock
from jaxlm.run.log import MetricsLog, Progress
from jaxlm.run.rl_rewards import Scoring
from jaxlm.run.watchdog import Watchdog
from jaxlm.steps import learn, policy, rollout, state
from jaxlm.steps.learn import Learner, RLState
from jaxlm.steps.policy import Critic, PolicyGradient
from jaxlm.steps.rollout import Sample, Sampler
from jaxlm.tools import Counters, Tool, by_name

AHEAD = 1024  # prompts of a task without an end that are looked at before a run begins


def check(e: Experiment, mesh) -> None:
    """Raises `UserError` for a definition that cannot run."""
    validate(e, mesh.shape["replica"] * mesh.shape["fsdp"])
    objectives.validate(e)
    policy.validate(e.objective, e.train.batch_size)
    asked = any(isinstance(part, parts.Correct | parts.CosineLength) for part in e.objective.reward)
    prompts.check(e.data, verdicts=asked or e.objective.dynamic is not None)


def check_prompts(e: Experiment, tokenizer) -> None:
    """Raises `UserError` for a prompt that leaves no room for a reply: of a task without an end among the first `AHEAD`
    of the run, otherwise among all that the run asks."""
    p, there = e.objective, prompts.size(e.data, "train")
    tries = 1 + (p.dynamic.retries if p.dynamic is not None else 0)
    count = min(e.train.steps * tries * (e.train.batch_size // p.samples), AHEAD if there is None else there)
    asked = (prompts.at(e.data, "train", e.seed, i) for i in range(count))
    for prompt in itertools.chain(prompts.heldout(e.data, max(2, p.heldout_prompts)), asked):
        rollout.prompt_ids(prompt, tokenizer, e.data.context, p.max_tokens, bool(e.data.tools))


# ------------------------------------------------------------------------------------------------------- the models
def _scalars(mesh):
    return lambda x: jax.device_put(x, sharding.replicated(mesh))


def _reference(e: Experiment, mesh, records: dict):
    """The parent's parameters, in buffers of their own: the policy's are donated step by step. Without a parent those
    that the policy began with."""
    if not e.objective.reference:
        return None
    if e.parent is None:
        fresh = state.create_sharded(e.model, e.optimizer, e.seed, mesh, None).params
    else:
        fresh = objectives.read_origin(e, "parent", mesh, records)[1]
    kept = {"backbone": fresh["backbone"], "heads": {k: x for k, x in fresh["heads"].items() if k == "lm"}}
    return jax.tree.map(lambda x: x.astype(e.model.precision.params), kept | {"adapters": {}})


def _critic(e: Experiment, mesh, records: dict):
    """(model, TrainState) of a separate critic, or (None, None).

    A reward model's head becomes the value head, on the scale that its reward has.
    """
    if not isinstance(e.objective.critic, Critic):
        return None, None
    optimizer, names = e.objective.critic.optimizer, learn.CRITIC
    if "critic" not in objectives.origins(e):
        return e.model, state.create_sharded(e.model, optimizer, e.seed, mesh, None, names)
    theirs, params = objectives.read_origin(e, "critic", mesh, records)
    value = heads.init_scalar("value", theirs.model, None)
    if "reward" in params["heads"]:
        scale, head = reward.read_scale(objectives.origins(e)["critic"]), params["heads"]["reward"]
        value = {"kernel": head["kernel"] * scale.gain, "bias": head["bias"] * scale.gain + scale.bias}
    params = {"backbone": params["backbone"], "heads": {"value": value}, "adapters": {}}
    target = state.abstract(theirs.model, optimizer, mesh, None, names)
    params = jax.tree.map(lambda x, t: jnp.asarray(x, t.dtype), params, target.params)

    def begin(params):
        return state.begin(params, heads.specs(theirs.model, None, names), optimizer, theirs.model.precision)

    with jax.set_mesh(mesh):
        return theirs.model, jax.jit(begin, out_shardings=jax.tree.map(lambda t: t.sharding, target))(params)


def _critic_model(e: Experiment):
    """The separate critic's model, without its parameters."""
    if "critic" in objectives.origins(e):
        return objectives.load.load_bound(objectives.origins(e)["critic"]).model
    return e.model if isinstance(e.objective.critic, Critic) else None


def begin(e: Experiment, mesh, records: dict) -> RLState:
    """The state before the first rollout."""
    s = train.initial_state(e, mesh, records)
    p: PolicyGradient = e.objective
    coefficient = 0.0 if p.kl is None else kl.first_coefficient(p.kl)
    return learn.begin(s, _critic(e, mesh, records)[1], coefficient, _scalars(mesh))


def learner(e: Experiment, critic_model, mesh) -> Learner:
    """The programs that learn from what was sampled."""
    return Learner(e.objective, e.model, e.lora, e.optimizer, critic_model, e.train, e.data.context + 1, e.seed, mesh)


# -------------------------------------------------------------------------------------------------------- the step
@dataclasses.dataclass
class Rolled:
    samples: list[Sample]
    right: list[float | None]
    metrics: dict[str, float]


class Trainer:
    """The step of a run: (state, number of the step) -> (state, metrics)."""

    def __init__(self, e: Experiment, mesh, tokenizer, reference, critic_model, scoring: Scoring, tools=None):
        self.e, self.p, self.mesh, self.scoring = e, e.objective, mesh, scoring
        self.reference, self.tools, self.counters = reference, tools, Counters()
        self.clock = Clock(phase="host")  # the parts of a step, `goodput.STEP_PARTS`
        self.sampler = Sampler(
            e.model, tokenizer, e.data.context, self.p.max_tokens, self.tools, self.p.max_calls, self.p.slots, mesh
        )
        self.learner = learner(e, critic_model, mesh)
        self._merge = jax.jit(functools.partial(lora.merge, e.lora))

    def between(self) -> None:
        """Called where a step can be left, up to its updates: at each look of the sampler and between its parts."""
        if self.sampler.between is not None:
            self.sampler.between()

    def acting(self, s: RLState):
        """The parameters that sample: the policy's own, in place."""
        if self.e.lora is None:
            return s.params
        with jax.set_mesh(self.mesh):
            return self._merge(s.params)

    def roll(self, s: RLState, n: int) -> Rolled:
        """The samples of a step, with dynamic sampling those of the groups that are kept."""
        p, wanted = self.p, self.e.train.batch_size // self.p.samples
        tries = 1 + (p.dynamic.retries if p.dynamic is not None else 0)
        with self.clock.phase("rollout"):
            sampler, params = self.sampler, self.acting(s)
        if self.tools is not None:
            sampler = dataclasses.replace(sampler, tools=journals.tools(self.scoring.journal, n, self.tools))
        samples, right, groups, asked, dropped = [], [], 0, 0, 0
        for attempt in range(tries):
            first = attempt * wanted
            chosen = [
                prompts.at(self.e.data, "train", self.e.seed, n * tries * wanted + first + i) for i in range(wanted)
            ]
            seed = rollout.seed_of(self.e.seed, rng.SAMPLE, n)
            with self.clock.phase("reward"):
                with self.scoring.ahead(n) as done, self.clock.phase("rollout"):
                    found = rollout.sample(
                        sampler, params, chosen, p.samples, p.temperature, seed, first, self.counters, done
                    )
                verdicts = self.scoring.verdicts(found, n)
            self.between()
            if attempt == 0:
                all_verdicts = [v for v in verdicts if v is not None]
            asked += wanted
            if p.dynamic is None:
                samples, right = found, verdicts
                break
            known = [v is not None for v in verdicts]
            kept, _ = advantage.with_spread([v or 0.0 for v in verdicts], [x.place for x in found], known)
            places = list(dict.fromkeys(x.place for x, k in zip(found, kept) if k))
            dropped += wanted - len(places)
            places = set(places[: wanted - groups])
            groups += len(places)
            samples += [x for x in found if x.place in places]
            right += [v for x, v in zip(found, verdicts) if x.place in places]
            if groups == wanted:
                break
        metrics = {}
        if p.dynamic is not None:
            metrics = {"dropped_groups": dropped / asked, "missing_groups": 1 - groups / wanted,
                       "right_before_dropping": float(np.mean(all_verdicts)) if all_verdicts else 0.0}  # fmt: skip
        return Rolled(samples, right, metrics)

    def process(self, found: list[Sample]) -> list[np.ndarray] | None:
        """Rewards of the thinking's steps, at each one's last token."""
        if self.p.process is None:
            return None
        out = []
        for s in found:
            values = np.zeros(len(s.prompt_ids) + len(s.reply.completion.ids), np.float32)
            given = shaping.numbers_in(parts.asked_text(s.prompt.asked))
            for step, _, end in shaping.thinking_steps(s.reply, self.sampler.tokenizer, given):
                values[len(s.prompt_ids) + end - 1] += self.p.process * step.reward
            out.append(values)
        return out

    def __call__(self, s: RLState, n: int):
        self.clock.take()  # what lay between the steps
        s, metrics, learned_from = self._step(s, n)
        spent = self.clock.take()
        whole = sum(spent.values())
        rates = {"steps_per_second": 1 / whole, "responses_per_second": learned_from / whole} if learned_from else {}
        return s, metrics | rates | spent

    def _step(self, s: RLState, n: int):
        """(state, metrics but those of time, how many samples were learned from)"""
        self.scoring.begin_step(n)
        rolled = self.roll(s, n)
        with self.clock.phase("reward"):
            rewards = self.scoring.rewards(rolled.samples, n) if rolled.samples else []
        self.between()
        metrics = dict(rolled.metrics)
        metrics |= self.counters.metrics("tools") if self.tools is not None else {}
        metrics |= {"kl/coefficient": float(s.kl_coefficient)} if self.p.kl is not None else {}
        if rolled.samples:
            metrics |= rl_metrics.of_samples(rolled.samples, rewards, rolled.right, self.scoring.seen)
        valid = [(x, r) for x, r in zip(rolled.samples, rewards) if r is not None]
        if not valid:
            return s.replace(step=s.step + 1), metrics | {"skipped": float(s.skipped), "no_samples": 1.0}, 0
        samples = [x for x, _ in valid]
        process = self.process(samples)
        metrics |= {"reward/process": float(np.mean([x.sum() for x in process]))} if process is not None else {}
        credited = learn.credit(
            self.learner,
            s,
            self.reference,
            [rollout.columns(x) for x in samples],
            np.array([r for _, r in valid], np.float32),
            np.array([x.place for x in samples]),
            process,
            self.clock.phase,
        )
        metrics |= credited.metrics
        if self.reference is not None:
            mean = float(credited.kl_N.mean())
            metrics |= {"kl/reference": mean, "kl/sqrt": max(mean, 0.0) ** 0.5}
        self.between()
        with self.clock.phase("update"):
            s, update_metrics = learn.learn(self.learner, s, credited.columns, n)
            metrics |= {k: float(v) for k, v in jax.device_get(update_metrics).items()}
        return learn.controlled(self.learner, s, credited.kl_N), metrics, len(samples)


# ---------------------------------------------------------------------------------------------------------- the run
def _records(e: Experiment) -> dict:
    """What lineage.json says of every run that this one reads: by step and hash, reward models too."""
    learned = [p.run for p in e.objective.reward if isinstance(p, parts.Learned)]
    scales = {run: dataclasses.asdict(reward.read_scale(run)) for run in learned}
    return objectives.origin_records(e) | ({"rewards": scales} if scales else {})


def _tools(data, scratch) -> dict[str, Tool] | None:
    """What the policy may call. Process 0, which alone calls it, has made what there is to search in `scratch`."""
    made = {}

    def make() -> list[str]:
        made.update(by_name(data.tools, prompts.texts_to_search(data, scratch), scratch))
        return list(made)

    return {name: made.get(name, Tool(name, "process 0 calls it", str)) for name in broadcast.from_first(make)} or None


def train_rl(e: Experiment, workdir, base: Experiment | None = None) -> int:
    """Runs or resumes the experiment in `workdir`; returns the exit code. `base` is what `diff.txt` compares with."""
    clock = Clock()
    train.use_compilation_cache()
    objectives.check_there(e)
    e = train.inherit(e)
    mesh = sharding.make_mesh(e.mesh)
    check(e, mesh)
    lineage.check_same_experiment(workdir, e)
    data = prepared(e.data)
    tokenizer, e = data.tokenizer, train.bind(e, data.tokenizer.vocab_size)
    objectives.check_tokenizers(e, tokenizer)
    check_prompts(e, tokenizer)
    transformer.validate(e.model)
    lora.validate(e.model, e.lora)
    lineage.check_same_experiment(workdir, e)

    root = train.open_workdir(workdir, tokenizer)
    # The data may take as long as it is large; from here on nothing takes long without a sign of life.
    with Watchdog(clock, e.train.hang_seconds, root), loop.memory_advice():
        checkpoints = Checkpoints(root, e.checkpoint)
        found, owed = checkpoints.latest(), False
        critic_model = _critic_model(e)
        if found is None:
            records = _records(e)
            s = begin(e, mesh, records)
            lineage.write_lineage(root, data.hashes, **records)
        else:
            target = learn.abstract(e.objective, e.optimizer, e.model, e.lora, critic_model, mesh)
            with clock.phase("restore"):
                s, metadata = checkpoints.restore(target, found)
            owed = metadata.get(loop.OWED, False)
            lineage.check_same_draws(metadata)
            records = storage.read_json(root / "lineage.json")
            if _records(e).get("rewards") != records.get("rewards"):
                raise UserError("a reward model has been trained on, or its scale set anew, since this run began")
            lineage.check_same_data(metadata["hashes"], data.hashes)
        first = int(s.step)
        scoring = Scoring(e, tokenizer, mesh, root, first)
        offered = _tools(e.data, root / "search")
        trainer = Trainer(e, mesh, tokenizer, _reference(e, mesh, records), critic_model, scoring, offered)
        train.write_definition(root, e, base, tokenizer)

        log = MetricsLog(root, e.train.tensorboard)
        rl_metrics.write_help(root)
        progress = Progress(e.train.steps, first, f"{e.train.batch_size} responses a step")
        watch = rl_metrics.Watch(progress)
        evaluation = rl_evals.Evaluation(e, trainer, log, progress, watch, root)
        alarms = rl_metrics.Alarms(e.objective, e.train.log_every, progress, rl_metrics.records_until(root, first))
        recorder = loop.Recorder(
            first=first,
            rates={},  # a step reads its own results: it knows how long it took
            max_skipped=e.train.max_skipped,
            sinks=[log.write, progress.update, watch, alarms],
            clock=clock,
            skipped=int(s.skipped),
        )
        try:
            with loop.stop_requests() as stopping:
                trainer.sampler = dataclasses.replace(trainer.sampler, between=_between(clock, stopping))
                if first == 0:
                    with clock.phase("evaluate"):
                        rl_evals.preflight(e, trainer, s, progress, root)
                        evaluation(0, s)
                _, code = loop.run(
                    s,
                    trainer,
                    lambda n: n,
                    e.train.steps,
                    recorder=recorder,
                    log_every=e.train.log_every,
                    evaluate=evaluation,
                    evaluate_every=e.evaluation.every,
                    checkpoints=checkpoints,
                    metadata=lineage.metadata(data.hashes),
                    ended=alarms.ended,
                    stopping=stopping,
                    owed=owed,
                )
        except Abandoned:  # before the first step: there is nothing to save
            return EXIT_PREEMPTED
        finally:
            progress.close()
            log.close()
            checkpoints.close()
    goodput.tell(root, progress.say)
    rl_plots.curves(root)
    return code


def _between(clock: Clock, stopping: Callable[[], bool]) -> Callable[[], None]:
    def between() -> None:
        clock.alive()
        if stopping():
            raise Abandoned

    return between


def run(e: Experiment, workdir, base: Experiment | None = None) -> int:
    """Trains whatever the definition's objective is; the exit code."""
    return (train_rl if isinstance(e.objective, PolicyGradient) else train.train)(e, workdir, base)
