"""The step of reinforcement learning as a whole: however it is cut, packed and spread, it is one gradient of one batch.

A huge epsilon makes Adam linear in the gradient: its sign at tiny entries would hide or blow up differences.
"""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.prompts import Prompt
from jaxlm.data.tokenizer import CharsTokenizer
from jaxlm.losses.policy import ALGORITHMS, KLTerm, PolicyLoss, SequenceSum, TokenRatio, ValueTerm
from jaxlm.nn.lora import LoRA
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Constant, Linear
from jaxlm.rl import kl
from jaxlm.rl.advantage import Gae, Rloo
from jaxlm.rl.kl import Adaptive, Fixed
from jaxlm.sharding import MeshConfig
from jaxlm.steps import learn, policy, rollout
from jaxlm.steps.learn import Learner
from jaxlm.steps.policy import GRPO, PPO, Critic, DynamicSampling, PolicyGradient, ValueHead
from jaxlm.steps.rollout import Sampler
from jaxlm.steps.update import Train
from tests.sample import scripted, test_chat
from tests.tiny_run import random_params

VOCABULARY = 48
MODEL = ModelConfig(vocab_size=VOCABULARY, vocab_multiple=2, layers=1, width=16, heads=2, hidden=32)
OPTIMIZER = AdamW(lr=1.0, eps=1.0, weight_decay=0.0, schedule=Constant())
WIDTH, N, G = 17, 16, 4
ONE = sharding.make_mesh(MeshConfig(fsdp=1))


NARROW = dataclasses.replace(MODEL, width=8, hidden=16)


def learner(
    objective, mesh=ONE, accumulation=1, lora=None, optimizer=OPTIMIZER, model=MODEL, critic=None, **train
) -> Learner:
    separate = (critic or model) if isinstance(objective.critic, Critic) else None
    train = Train(**{"batch_size": N, "accumulation": accumulation, "loss_chunk": None} | train)
    return Learner(objective, model, lora, optimizer, separate, train, WIDTH, 0, mesh)


def spread(params, abstract):
    return jax.tree.map(lambda x, a: jax.device_put(np.asarray(x), a.sharding), params, abstract)


def beginning(learner: Learner, coefficient=0.0):
    """A state with parameters whose distributions are far from flat, the same on any mesh."""
    target = learn.abstract(
        learner.objective, learner.optimizer, learner.model, learner.lora, learner.critic_model, learner.mesh
    )
    s = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), target)
    grown = random_params(learner.model, scale=0.3)
    params = {k: grown.get(k, {}) for k in ("backbone", "heads", "adapters")}
    if "value" in target.params["heads"]:
        params["heads"] = params["heads"] | {"value": s.params["heads"]["value"]}
    if learner.lora is not None:
        rng = np.random.default_rng(5)
        params["adapters"] = jax.tree.map(
            lambda a: rng.normal(size=a.shape).astype(a.dtype) * 0.1, target.params["adapters"]
        )
    critic = s.critic
    if critic is not None:
        theirs = learner.critic_model
        head = {"kernel": np.linspace(-1, 1, theirs.width, dtype=np.float32), "bias": np.float32(0.1)}
        own = {"backbone": random_params(theirs, scale=0.3)["backbone"], "heads": {"value": head}, "adapters": {}}
        critic = critic.replace(params=spread(own, target.critic.params))
    coefficient = jax.device_put(np.float32(coefficient), target.kl_coefficient.sharding)
    return s.replace(params=spread(params, target.params), critic=critic, kl_coefficient=coefficient)


def reference(seed=9):
    params = random_params(MODEL, seed=seed, scale=0.3)
    return {"backbone": params["backbone"], "heads": params["heads"], "adapters": {}}


def drawn(seed=0, nan=True):
    """Sequences with prompts of two lengths, early ends, tokens of a tool inside, two temperatures."""
    rng, out = np.random.default_rng(seed), []
    for i in range(N):
        before, response = (2, 5)[i % 2], int(rng.integers(1, 9))
        n = before + response
        sampled = np.arange(n) >= before
        if response > 4:
            sampled[before + 1 : before + 3] = False
        logprobs = rng.normal(-3, 0.5, n).astype(np.float32)
        out.append({
            "tokens": rng.integers(0, VOCABULARY, n).astype(np.int32),
            "sampled_by_policy": sampled,
            "rollout_logprobs": np.where(sampled, logprobs, np.nan if nan else 0.0).astype(np.float32),
            "temperature": np.full(n, (0.7, 1.0)[i % 3 == 0], np.float32),
        })  # fmt: skip
    return out, rng.normal(size=N).astype(np.float32), np.repeat(np.arange(N // G), G)


def stepped(learner: Learner, batch, ref=None, coefficient=0.0, order=None):
    columns, scores, groups = batch
    if order is not None:
        columns, scores, groups = [columns[i] for i in order], scores[order], groups[order]
    s = beginning(learner, coefficient)
    credited = learn.credit(learner, s, ref, columns, scores, groups)
    after, metrics = learn.learn(learner, s, credited.columns, 0)
    return after, credited, jax.device_get(metrics)


def moved(after, learner):
    """What the step did to the policy, and to the critic if there is one."""
    before = beginning(learner)
    pairs = [(after.params, before.params)] + ([(after.critic.params, before.critic.params)] if after.critic else [])
    return jax.device_get([jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), *pair) for pair in pairs])


def assert_same(a, b, rtol=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=rtol * max(float(np.abs(y).max()), 1e-7))


EVERYTHING = dataclasses.replace(
    PPO, samples=G, epochs=1, minibatches=1, kl=Adaptive(0.1, target=1.0, horizon=50.0), whiten_rewards=True,
    loss=PolicyLoss(
        Gae(0.99, 0.9), TokenRatio(0.2, 0.3, 3.0), SequenceSum(), ValueTerm(0.5), KLTerm("k2", 0.1), 0.01, 2.0
    ),
    critic=Critic(optimizer=OPTIMIZER),
)  # fmt: skip


@pytest.fixture(scope="module")
def everything():
    x = learner(EVERYTHING)
    after, credited, metrics = stepped(x, drawn(), reference(), 0.1)
    return x, after, credited, metrics


# ------------------------------------------------------------------------------------------------------ one gradient
def one_to_a_row(lengths, width):
    return [[i] for i in range(len(list(lengths)))]


def assert_same_step(x, one, other):
    """Of what `stepped` gives: all that is known of each sampled token, what was learned, and what is logged."""
    (after, credited, metrics), (after_other, credited_other, metrics_other) = one, other
    for a, b in zip(credited.columns, credited_other.columns):
        assert a.keys() == b.keys()
        own = a["sampled_by_policy"]
        for name in a:
            np.testing.assert_allclose(a[name][own], b[name][own], rtol=2e-5, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(credited.kl_N, credited_other.kl_N, rtol=1e-4, atol=1e-5)
    assert_same(moved(after_other, x), moved(after, x))
    shared = {k for k in metrics if "max" not in k}
    for name in shared:
        np.testing.assert_allclose(metrics_other[name], metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_packed_is_padded(everything, monkeypatch):
    x, *packed = everything
    monkeypatch.setattr(learn, "layout", one_to_a_row)
    padded = stepped(x, drawn(), reference(), 0.1)
    assert packed[1].metrics["rows"] < N == padded[1].metrics["rows"]
    assert_same_step(x, packed, padded)


def test_chunked_log_probabilities_are_those_of_whole_rows(everything):
    """Rows of 16 scored tokens, 5 at a time: in the old, the reference's and the live ones, with their entropies."""
    x, *whole = everything
    chunked = learner(EVERYTHING, loss_chunk=5)
    assert_same_step(x, whole, stepped(chunked, drawn(), reference(), 0.1))


def test_what_the_policy_did_not_sample_never_matters(everything):
    """NaN stands there above; here it is a number, and the order of sequences is another."""
    x, after, credited, _ = everything
    order = np.random.default_rng(1).permutation(N)
    again, credited_again, _ = stepped(x, drawn(nan=False), reference(), 0.1, order)
    for i, a in zip(order, credited_again.columns):
        np.testing.assert_allclose(a["advantages"], credited.columns[i]["advantages"], rtol=1e-4, atol=1e-5)
    assert_same(moved(again, x), moved(after, x))


def test_all_of_it_moves_and_the_reference_does_not(everything):
    x, after, _, metrics = everything
    policy_moves, critic_moves = moved(after, x)
    assert all(np.abs(m).max() > 0 for m in jax.tree.leaves([policy_moves["heads"], critic_moves["heads"]]))
    ref = reference()
    held = jax.tree.map(lambda a: jax.device_put(np.asarray(a)), ref)
    stepped(x, drawn(), held, 0.1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(held), ref)
    assert {"policy", "kl", "entropy", "critic/value", "importance_weight"} <= metrics.keys()
    assert 0 < metrics["importance_weight"] <= 2.0 and metrics["gradient_norm"] > 0


def test_the_kl_controller_follows_what_it_saw(everything):
    x, after, credited, _ = everything
    found = float(learn.controlled(x, after, credited.kl_N).kl_coefficient)
    assert found == pytest.approx(float(kl.next_coefficient(EVERYTHING.kl, 0.1, credited.kl_N.mean(), N)), rel=1e-6)
    assert found != pytest.approx(0.1, rel=1e-4)


SIMPLE = dataclasses.replace(GRPO, samples=G, loss=dataclasses.replace(ALGORITHMS["grpo"], kl=KLTerm("k3", 0.2)))


# Without a critic; with one of the policy's size; with a smaller one.
SETTINGS = {"grpo": (SIMPLE, None), "ppo": (EVERYTHING, None), "smaller critic": (EVERYTHING, NARROW)}


@pytest.fixture(scope="module", params=SETTINGS)
def uncut(request):
    """(objective, critic's model, what a step of one batch on one device does)"""
    objective, critic = SETTINGS[request.param]
    x = learner(objective, critic=critic)
    moves = moved(stepped(x, drawn(), reference(), 0.1)[0], x)
    if objective is EVERYTHING:
        assert moves[1]["heads"]["value"]["kernel"].shape == ((critic or MODEL).width,)
    return objective, critic, moves


@pytest.mark.parametrize("accumulation", [2, 4])
def test_microbatches_give_the_gradient_of_the_whole(uncut, accumulation):
    objective, critic, moves = uncut
    x = learner(objective, accumulation=accumulation, critic=critic)
    assert_same(moved(stepped(x, drawn(), reference(), 0.1)[0], x), moves)


def test_eight_devices_give_the_gradient_of_one(uncut):
    objective, critic, moves = uncut
    x = learner(objective, sharding.make_mesh(MeshConfig(fsdp=4, tensor=2)), critic=critic)
    after = stepped(x, drawn(), reference(), 0.1)[0]
    for params in [after.params, *([after.critic.params] if after.critic else [])]:
        assert len(jax.tree.leaves(params)[0].sharding.device_set) == 8
    assert_same(moved(after, x), moves)


# ------------------------------------------------------------------------------------------------------- first step
@pytest.fixture(params=["packed", "right", "left"])
def padding(request, monkeypatch):
    """How sequences lie in rows: several to a row, or one, with the padding on its right or on its left."""

    def to_the_right(sequences, rows, count, width):
        batch = rollout.arrange(sequences, rows, count, width)
        spare = (batch.segments == 0).sum(axis=1)
        return jax.tree.map(lambda x: np.stack([np.roll(row, n) for row, n in zip(x, spare)]), batch)

    def from_the_right(x_RT, sequences, rows):
        whole = {i: x_RT[r, x_RT.shape[1] - len(sequences[i]["tokens"]) :] for r, (i,) in enumerate(rows)}
        return [whole[i] for i in range(len(sequences))]

    if request.param != "packed":
        monkeypatch.setattr(learn, "layout", one_to_a_row)
    if request.param == "left":
        monkeypatch.setattr(learn, "arrange", to_the_right)
        monkeypatch.setattr(learn, "gathered", from_the_right)
    return request.param


def test_the_first_ratio_is_one_and_the_sampler_agrees(padding):
    """Real samples at T=.7, prompts of two lengths, some of which end early."""
    tokenizer = CharsTokenizer("abcdefghijkl")
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    sampler = Sampler(model, tokenizer, WIDTH - 1, 8, slots=4)
    asked = [Prompt(text, {}, "") for text in ("ab", "cdefg")]
    x = learner(dataclasses.replace(GRPO, epochs=2, samples=4), model=model)
    s = beginning(x)
    found = rollout.sample(sampler, s.params, asked, 4, 0.7, seed=1)
    assert {c.ended for c in found} == {True, False}
    columns, scores = [rollout.columns(f) for f in found], np.arange(8.0, dtype=np.float32)
    credited = learn.credit(x, s, None, columns, scores, np.array([f.place for f in found]))
    _, metrics = learn.learn(x, s, credited.columns, 0)
    metrics = jax.device_get(metrics)
    assert metrics["first/ratio_deviation_max"] < 2e-6
    assert metrics["ratio_deviation_max"] > 1e-4  # the second epoch's is no longer 1: the measure can move
    assert 0 < metrics["sampler_gap_max"] < 1e-4
    hotter = [c | {"temperature": np.ones_like(c["temperature"])} for c in columns]
    credited = learn.credit(x, beginning(x), None, hotter, scores, np.array([f.place for f in found]))
    gap = [np.abs(c["old_logprobs"] - c["rollout_logprobs"])[c["sampled_by_policy"]].max() for c in credited.columns]
    assert max(gap) > 0.05  # another temperature in scoring would be seen


def test_what_tools_wrote_is_stepped_over_and_what_follows_agrees(padding):
    """A model that calls a tool with random sums, at T=.7: the trainer gives its tokens the sampler's probabilities."""
    ask = Prompt(Conversation((Message("user", "how much?"),)), {}, "")
    sampler = Sampler(scripted.AUTOMATON, scripted.TOKENIZER, 96, 32, tools=test_chat.TOOLS, slots=4)
    x = learner(dataclasses.replace(GRPO, epochs=2, samples=4), model=scripted.AUTOMATON)
    x = dataclasses.replace(x, width=sampler.context + 1)
    params = scripted.automaton(test_chat.SUMS)
    found = rollout.sample(sampler, params, [ask], 4, 0.7, seed=1)
    columns = [rollout.columns(f) for f in found]
    forced = [c["sampled_by_policy"][len(f.prompt_ids) :].tolist().count(False) for f, c in zip(found, columns)]
    assert all(n >= 3 for n in forced)  # two symbols and a digit at least
    s = beginning(x).replace(params=spread(params, beginning(x).params))
    credited = learn.credit(x, s, None, columns, np.arange(4.0, dtype=np.float32), np.zeros(4, int))
    for c in credited.columns:
        own = c["sampled_by_policy"]
        np.testing.assert_allclose(c["old_logprobs"][own], c["rollout_logprobs"][own], atol=1e-4)
        assert np.abs(c["rollout_logprobs"][own]).max() > 1.0 and not c["advantages"][~own].any()
    metrics = jax.device_get(learn.learn(x, s, credited.columns, 0)[1])
    assert metrics["first/ratio_deviation_max"] < 5e-5  # the logits are 100, whose last bit is 8e-6
    assert metrics["ratio_deviation_max"] > 1e-3 and metrics["sampler_gap_max"] < 1e-4


# --------------------------------------------------------------------------------------------------- process rewards
def thought(i: int, process):
    """(columns, process rewards) of a prompt of 2, a token, a tool's token and two more; noise where nothing counts."""
    sampled = np.array([False, False, True, False, True, True])
    own = {
        "tokens": np.arange(6, dtype=np.int32) + i, "sampled_by_policy": sampled,
        "rollout_logprobs": np.where(sampled, -1, np.nan).astype(np.float32), "temperature": np.ones(6, np.float32),
    }  # fmt: skip
    return own, np.array([9, 9, process[0], 7, *process[1:]], np.float32)


def test_process_rewards_by_hand_through_gae():
    """Values of 0 and a decay of .5 * .8 = .4 a token, the tool's stepped over: with the score of 1 at the end,
    1 + .25, then 0 + .4 * 1.25, then .5 + .4 * .5."""
    loss = dataclasses.replace(ALGORITHMS["ppo"], advantage=Gae(0.5, 0.8))
    x = learner(PolicyGradient(loss=loss, samples=1, critic=ValueHead()))
    columns, process = zip(thought(0, (0.5, 0, 0.25)), thought(7, (0, -0.5, 0)))
    scores = np.array([1.0, 0.0], np.float32)
    a, b = learn.credit(x, beginning(x), None, columns, scores, np.arange(2), process).columns
    np.testing.assert_allclose(a["advantages"], [0, 0, 0.7, 0, 0.5, 1.25], rtol=1e-6)
    np.testing.assert_allclose(b["advantages"], [0, 0, -0.2, 0, -0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(a["returns"], a["advantages"], rtol=1e-6)


def test_process_rewards_by_hand_in_a_group():
    """Totals 1.75 and .25 of one prompt, 0 and .5 of another: each token of a response gets its total less the other's
    (RLOO)."""
    x = learner(dataclasses.replace(GRPO, samples=2, loss=ALGORITHMS["rloo"]))
    steps = ((0.5, 0, 0.25), (0, 0.25, 0), (0, 0, 0), (-0.5, 0, 0))
    columns, process = zip(*(thought(i, p) for i, p in enumerate(steps)))
    scores = np.array([1.0, 0.0, 0.0, 1.0], np.float32)
    credited = learn.credit(x, beginning(x), None, columns, scores, np.array([0, 0, 1, 1]), process)
    for c, want in zip(credited.columns, (1.5, -1.5, -0.5, 0.5)):
        np.testing.assert_allclose(c["advantages"], [0, 0, want, 0, want, want], rtol=1e-6)


# ------------------------------------------------------------------------------------------------ heads and adapters
def test_a_value_head_on_the_policy_with_adapters():
    loss = dataclasses.replace(ALGORITHMS["ppo"], value=ValueTerm(1.0, None))
    x = learner(PolicyGradient(loss=loss, samples=1, critic=ValueHead(), kl=Fixed(0.1)), lora=LoRA(rank=2))
    s = beginning(x, 0.1)
    base = {"backbone": s.params["backbone"], "heads": {"lm": s.params["heads"]["lm"]}, "adapters": {}}
    base = jax.tree.map(lambda a: jax.device_put(np.asarray(a)), base)
    columns, scores, groups = drawn()
    credited = learn.credit(x, s, base, columns, scores, groups)
    assert all(not c["values"].any() for c in credited.columns)  # a fresh head says exactly 0
    assert np.abs(credited.kl_N).max() > 1e-3  # of the adapters, which the reference does not have
    after, _ = learn.learn(x, s, credited.columns, 0)
    (moves,) = moved(after, x)
    assert not any(np.abs(m).max() for m in jax.tree.leaves(moves["backbone"]))
    assert all(np.abs(m).max() > 0 for m in jax.tree.leaves([moves["adapters"], moves["heads"]["value"]]))


# ------------------------------------------------------------------------------------------------------- minibatches
def test_an_epoch_goes_through_every_sequence_once():
    x = learner(dataclasses.replace(GRPO, epochs=2, minibatches=3, samples=G))
    columns = [c | {"advantages": np.full(len(c["tokens"]), i, np.float32)} for i, c in enumerate(drawn()[0])]

    def of(step, epoch):
        batches = learn.minibatches(x, columns, step, epoch)
        assert len({b.tokens.shape for b in batches}) == 1 and len(batches) == 3
        return [sorted(set(b.advantages[b.segments > 0].astype(int).tolist())) for b in batches]

    assert sorted(i for part in of(0, 0) for i in part) == list(range(N))
    assert of(0, 0) == of(0, 0) and of(0, 0) != of(0, 1) and of(0, 0) != of(1, 0)


def test_fewer_sequences_than_minibatches_leave_no_empty_update():
    x = learner(dataclasses.replace(GRPO, minibatches=3, samples=G))
    assert len(learn.minibatches(x, drawn()[0][:2], 0, 0)) == 2


# ------------------------------------------------------------------------------------------------------- the bandit
BETA = 0.5
DECAYING = AdamW(lr=0.03, b2=0.99, weight_decay=0.0, schedule=Linear())
AROUND = {"samples": 32, "kl": Fixed(BETA), "epochs": 2}
# Rewards of replies, of one token or of two, where "" is the stop token; steps, and how close they come.
BANDITS = {
    "without a critic": (
        PolicyGradient(loss=PolicyLoss(Rloo(), TokenRatio(), SequenceSum()), max_tokens=1, **AROUND),
        {("",): 0.0, ("a",): 1.0, ("b",): 2.0},
        (120, 2e-4),
    ),
    # As PPO ships, with GAE and clipped values, but for the whitening, which would blow the last noise up.
    "with a critic": (
        PolicyGradient(loss=ALGORITHMS["ppo"], critic=Critic(optimizer=DECAYING), max_tokens=2, **AROUND),
        {
            ("",): 0.0,
            ("a", ""): 1.0,
            ("a", "a"): 0.5,
            ("a", "b"): 2.0,
            ("b", ""): 0.0,
            ("b", "a"): 1.5,
            ("b", "b"): 1.0,
        },
        (160, 5e-4),
    ),
}


@pytest.mark.parametrize("name", BANDITS)
def test_ppo_reaches_the_closed_form_optimum(name):
    """pi* is proportional to pi_ref * exp(r / beta), with the KL in the reward: there every reply has the same total
    reward, the gradient's noise is gone with the gradient, and sampling finds the optimum to rounding. A critic that
    has learned what is still to come makes the advantage of every token 0 there, so that GAE gets there too."""
    objective, rewards, (steps, tolerance) = BANDITS[name]
    tokenizer = CharsTokenizer("ab")
    a, b = tokenizer.encode("ab")
    gain = {tuple({"": tokenizer.eos, "a": a, "b": b}[c] for c in reply): r for reply, r in rewards.items()}
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    x = learner(objective, model=model, optimizer=DECAYING, steps=steps)
    sampler, prompt = Sampler(model, tokenizer, 16, objective.max_tokens, slots=32), Prompt("ab", {}, "")
    asked, s = [tokenizer.bos, a, b], beginning(x, BETA)
    frozen = jax.tree.map(lambda a: jax.device_put(np.asarray(a)), s.params)

    def chances(params):
        columns = [{"tokens": np.array([*asked, *q], np.int32), "temperature": np.ones(3 + len(q), np.float32)}
                   for q in gain]  # fmt: skip
        rows = [[i] for i in range(len(gain))]
        scored, _ = x.score(params, rollout.place(rollout.arrange(columns, rows, len(gain), WIDTH), ONE))
        p = np.exp([np.asarray(scored)[i, 2 : 2 + len(q)].sum() for i, q in enumerate(gain)])
        return p / p.sum()  # among what may be sampled

    start = chances(frozen)
    best = start * np.exp(np.array(list(gain.values())) / BETA)
    best /= best.sum()
    assert np.abs(start - best).max() > 0.1
    for n in range(steps):
        found = rollout.sample(sampler, s.params, [prompt], 32, 1.0, rollout.seed_of(0, 3, n))
        scores = np.array([gain[f.reply.completion.ids] for f in found], np.float32)
        credited = learn.credit(x, s, frozen, [rollout.columns(f) for f in found], scores, np.zeros(32, int))
        s, _ = learn.learn(x, s, credited.columns, n)
    np.testing.assert_allclose(chances(s.params), best, atol=tolerance)
    assert credited.metrics["advantage_std"] < 2e-3


# ------------------------------------------------------------------------------------------------------- definitions
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"samples": 0}, "at least 1"),
        ({"samples": 3}, "no multiple of samples 3"),
        ({"samples": 1}, "compares the samples of a prompt"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"minibatches": 17}, "cannot be cut into 17"),
        ({"critic": Critic()}, "goes with a critic"),
        ({"loss": ALGORITHMS["ppo"]}, "goes with a critic"),
        ({"loss": dataclasses.replace(ALGORITHMS["grpo"], value=ValueTerm())}, "loss.value is the critic's"),
        ({"reference": False, "kl": Fixed()}, "needs the reference"),
        ({"loss": ALGORITHMS["rloo"], "epochs": 2}, "good for one update"),
        ({"reward": ()}, "reward is empty"),
        ({"dynamic": DynamicSampling(-1)}, "retries"),
        ({"reward_timeout": 0.0}, "reward_timeout"),
        ({"gold": "function"}, "gold 'function' is no part of the reward: correct"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other(changes, words):
    with pytest.raises(UserError, match=words):
        policy.validate(dataclasses.replace(GRPO, samples=4, **changes) if "samples" not in changes
                        else dataclasses.replace(GRPO, **changes), N)  # fmt: skip


@pytest.mark.parametrize("name", ["REINFORCE", "RLOO", "GRPO", "DR_GRPO", "DAPO", "GSPO", "CISPO", "PPO"])
def test_the_named_algorithms_stand(name):
    policy.validate(getattr(policy, name), 16)
