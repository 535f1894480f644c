"""The wrongs that a step of training can have, put into it one by one: the check beside each notices."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import sharding
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.prompts import Prompt
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.data.trajectory import Trajectory
from jaxlm.losses import lm
from jaxlm.nn import transformer
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW
from jaxlm.sample import engine, requests, slots
from jaxlm.sample import logits as sampling
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion
from jaxlm.steps import learn, policy, preference, pretrain, reward, rollout, update
from jaxlm.steps.policy import GRPO
from jaxlm.steps.preference import Preference
from jaxlm.steps.pretrain import NextToken
from jaxlm.steps.reward import RewardModel
from jaxlm.steps.rollout import Sample, Sampler
from jaxlm.steps.update import Train
from tests.rl.mutate import Mutation, mutation_tests
from tests.sample.scripted import AUTOMATON, automaton, symbol
from tests.steps import offline
from tests.tiny_run import random_params

TOKENIZER = BytesTokenizer()
MODEL = ModelConfig(vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, dropout=0.5)
PARAMS = random_params(MODEL, scale=0.2)
SAID = Completion((40, 41, 42), (-1.0, 0.0, -2.0), "", "stop", (True, False, True))
SAMPLE = Sample(Prompt("x", {}, ""), 0, 0, (2, 50), Reply(Message("assistant", ""), SAID), 0.7)


def near(got, want):
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- checks
def every_step_draws_anew():
    assert len({rollout.seed_of(0, 3, n) for n in range(20)}) == 20


def samples_of_a_prompt_differ():
    sampler = Sampler(MODEL, TOKENIZER, context=64, max_tokens=6, slots=4)
    found = rollout.sample(sampler, PARAMS, [Prompt("abc", {}, "0"), Prompt("de", {}, "1")], 2, 0.7, seed=3)
    assert len({s.reply.completion.ids for s in found}) == 4


END = symbol("<|im_end|>")
ONE = sharding.make_mesh(sharding.MeshConfig(fsdp=1))


def answers(after: str, max_tokens: int) -> list[Sample]:
    """Four of a policy that says "a" or "b" and then stops, and would go on with `after`. The prompt holds the very
    stop token, at the end of what the user says."""
    says = {"<|im_sep|>": ("a", "b"), "a": "<|im_end|>", "b": "<|im_end|>", "<|im_end|>": after}
    sampler = Sampler(AUTOMATON, TOKENIZER, context=64, max_tokens=max_tokens, slots=4)
    asked = Prompt(Conversation((Message("user", "hm"),)), {}, "0")
    found = rollout.sample(sampler, automaton(says), [asked], 4, 0.7, seed=1)
    assert all(END in s.prompt_ids for s in found)
    assert {s.reply.completion.ids[0] for s in found} == {symbol("a"), symbol("b")}
    return found


def a_response_ends_with_its_first_stop_token():
    for max_tokens, stops, ended in ((4, [END], True), (2, [END], True), (1, [], False)):
        for s in answers("g", max_tokens):
            own = rollout.columns(s)
            before = len(s.prompt_ids)
            assert s.ended == ended and own["tokens"][before + 1 :].tolist() == stops
            assert own["sampled_by_policy"].tolist() == [False] * before + [True] * (1 + len(stops))
            assert len(own["rollout_logprobs"]) == len(own["tokens"])


def what_would_follow_the_stop_changes_nothing():
    """No reward, loss or gradient: what the policy would say after its stop is none of its response."""
    grpo = dataclasses.replace(GRPO, samples=4, epochs=2)
    x = learn.Learner(grpo, AUTOMATON, None, AdamW(), None, Train(batch_size=4), 64, 0, ONE)
    loss = policy.make_loss(AUTOMATON, None, grpo.loss, None)

    def outcome(after):
        found = answers(after, 6)
        scores = rollout.score(lambda _, replies, __: [sum(r.completion.ids) for r in replies], found, 0, None, "ids")
        s = types.SimpleNamespace(params=automaton({"<|im_sep|>": ("a", "b"), "<|im_end|>": after}))
        columns = [rollout.columns(s) for s in found]
        credited = learn.credit(x, s, None, columns, np.float32(scores), np.zeros(4, int)).columns
        batch = rollout.arrange(credited, rollout.layout([len(c["tokens"]) for c in credited], 64), 4, 64)

        def value(params):
            ((_, total, weight),) = loss(params, batch, None)[0].values()
            return total / weight

        return scores, [c["advantages"] for c in credited], jax.jit(jax.value_and_grad(value))(s.params)

    one, other = outcome("g"), outcome("h")
    jax.tree.map(near, one, other)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(one[2][1])) > 0.1


def only_what_the_policy_sampled_is_trained_on():
    assert rollout.columns(SAMPLE)["sampled_by_policy"].tolist() == [False, False, True, False, True]


def two_in_a_row():
    own = rollout.columns(SAMPLE)
    return own, rollout.arrange([own, own], [[0, 1]], 1, 12)


def segments_begin_at_zero_and_see_only_themselves():
    _, batch = two_in_a_row()
    near(batch.positions, [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0]])
    near(batch.segments, [[1] * 5 + [2] * 5 + [0] * 2])
    assert batch.sampled_by_policy.tolist() == [[False, False, True, False, True] * 2 + [False] * 2]


def scores_are_those_of_the_next_token_at_its_temperature():
    own, batch = two_in_a_row()
    tokens = jnp.asarray(own["tokens"])[None]
    plain = dataclasses.replace(MODEL, dropout=0.0)

    def by_hand(params):
        hidden, _, _ = transformer.apply(plain, params, tokens, jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32))
        return jax.nn.log_softmax(transformer.unembed(plain, params, hidden)[0] / 0.7)

    scored = jax.jit(lambda params, batch: policy.scored(MODEL, None, params, batch)[0])(PARAMS, batch)
    table = jax.jit(by_hand)(PARAMS)
    want = [float(table[i, own["tokens"][i + 1]]) for i in range(4)]
    near(scored[0, :4], want)
    near(scored[0, 5:9], want)


def padded_columns_have_no_probability():
    """37 of 48 columns are tokens; the others, likeliest by far if they were some, are in no sum. By hand, in numpy."""
    cfg = ModelConfig(vocab_size=37, vocab_multiple=16, layers=1, width=8, heads=2)
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(8, 48))
    kernel[:, 37:] = 20 * np.sign(kernel[:, :1])
    hidden, targets = generator.normal(size=(1, 3, 8)), np.array([[5, 36, 0]])
    logits = (hidden @ kernel[:, :37] / 0.7)[0]
    assert (hidden @ kernel[:, 37:]).max() > 30 > logits.max()
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def outcome(params, hidden, targets):
        at = jnp.full((1, 3), 0.7)
        trained, _, entropy = lm.token_logprobs(cfg, params, hidden, targets, None, at, entropy=True)
        return trained, entropy, sampling.token_logprobs(transformer.unembed(cfg, params, hidden)[0], at[0])

    params = {"backbone": {}, "heads": {"lm": {"kernel": jnp.asarray(kernel, jnp.float32)}}}
    trained, entropy, sampled = jax.jit(outcome)(params, jnp.asarray(hidden, jnp.float32), targets)
    near(trained[0], want[range(3), targets[0]])
    near(entropy[0], -(np.exp(want) * want).sum(-1))
    near(sampled[:, :37], want)
    assert not np.exp(sampled[:, 37:]).any()


def credit_goes_to_its_own_group():
    """Two prompts of two samples; the first pair of each is right. .7 and -.3 are no integers."""
    x = learn.Learner(
        dataclasses.replace(GRPO, samples=2, whiten_advantages=False), MODEL, None, AdamW(), None, Train(batch_size=4),
        12, 0, ONE,
    )  # fmt: skip
    own = rollout.columns(SAMPLE)
    scores = np.array([0.7, -0.3, 0.1, 0.9], np.float32)
    credited = learn.credit(x, None, None, [own] * 4, scores, np.array([0, 0, 1, 1]))
    half = 0.5**0.5
    for c, want in zip(credited.columns, (half, -half, -half, half)):
        near(c["advantages"], [0, 0, want, 0, want])


def kl_of_the_sample() -> float:
    """Of `SAMPLE` to the reference with `PARAMS`: log p of the sampler less the reference's, by hand."""
    own = rollout.columns(SAMPLE)
    plain, tokens = dataclasses.replace(MODEL, dropout=0.0), jnp.asarray(own["tokens"])[None]
    hidden, _, _ = transformer.apply(plain, PARAMS, tokens, jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32))
    table = jax.nn.log_softmax(transformer.unembed(plain, PARAMS, hidden)[0] / 0.7)
    return (-1.0 - float(table[1, 40])) + (-2.0 - float(table[3, 42]))


def gone_on():
    """A policy that is no longer its reference."""
    return types.SimpleNamespace(params=jax.tree.map(lambda leaf: 1.5 * leaf, PARAMS))


def the_reference_stays_where_it_was():
    """The KL of a policy that has gone on to what it came from."""
    x = learn.Learner(
        dataclasses.replace(GRPO, samples=2), MODEL, None, AdamW(), None, Train(batch_size=2), 12, 0, ONE,
    )  # fmt: skip
    columns = [rollout.columns(SAMPLE)] * 2
    credited = learn.credit(x, gone_on(), PARAMS, columns, np.zeros(2, np.float32), np.zeros(2, int))
    near(credited.kl_N, [kl_of_the_sample()] * 2)


PLAIN = dataclasses.replace(MODEL, dropout=0.0)


def with_head(name: str) -> dict:
    kernel = jnp.linspace(-1, 1, MODEL.width)
    return PARAMS | {"heads": {name: {"kernel": kernel, "bias": jnp.float32(0.1)}}}


def assert_no_dropout(outcome):
    """outcome: (model) -> arrays of a function that scores; the model's dropout is to make no difference."""
    got, want = (jax.jit(lambda model=model: outcome(model))() for model in (MODEL, PLAIN))
    jax.tree.map(near, got, want)
    assert max(np.abs(x).max() for x in jax.tree.leaves(want)) > 0.1


def a_reward_knows_no_dropout():
    rows, params = offline.batch(), with_head("reward")

    def outcome(model):
        sums = reward.evaluation_sums(RewardModel(), model, params, rows)
        return reward.scores(model, params, rows), sums["loss"]

    assert_no_dropout(outcome)


def a_critic_knows_no_dropout():
    rows, params = offline.batch(), with_head("value")
    assert_no_dropout(lambda model: policy.values(model, params, rows))


def preferences_are_measured_without_dropout():
    """Of the policy and of its reference, which are the same here: no answer has gained on another."""
    rows = offline.batch()
    rows = rows.replace(rank=np.broadcast_to(np.arange(offline.S, dtype=np.int32), rows.rank.shape))  # no ties

    def outcome(model):
        sums = preference.evaluation_sums(Preference(), model, None, (model, PARAMS), PARAMS, rows)
        return preference.response_logprobs(model, PARAMS, rows, None), sums["loss"] / sums["weight"]

    assert_no_dropout(outcome)
    loss = preference.make_loss(Preference(), PLAIN, Train(), (MODEL, PARAMS))
    ((_, total, weight),) = jax.jit(lambda: loss(PARAMS, rows, jax.random.key(1))[0])().values()
    near(total / weight, np.log(2))  # where the policy is trained, with a key, its reference has none


def fine_tuning_counts_what_is_to_be_trained_on():
    """Two conversations in a row, each scored as if it were alone: the mean over the tokens under the loss mask."""
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 50, (1, 12)).astype(np.int32), (5, 7)
    row = {"positions": np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32),
           "segments": np.repeat([1, 2], lengths)[None].astype(np.int32),
           "loss_mask": np.array([[0, 0, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1]], bool)}  # fmt: skip
    batch = Trajectory(tokens=tokens, **row)

    def outcome(params):
        terms, _ = pretrain.make_loss(NextToken(), MODEL, Train(loss_chunk=None))(params, batch, None)
        alone = [tokens[:, :5], tokens[:, 5:]]
        each = [(np.arange(t.shape[1])[None], np.ones(t.shape, np.int32)) for t in alone]
        hidden = [transformer.apply(PLAIN, params, t, *about)[0] for t, about in zip(alone, each)]
        return terms, [jax.nn.log_softmax(transformer.unembed(PLAIN, params, h)[0]) for h in hidden]

    terms, tables = jax.jit(outcome)(PARAMS)
    ((_, total, weight),), want, at = terms.values(), [], 0
    for table, n in zip(tables, lengths):
        want += [-table[t - 1, tokens[0, at + t]] for t in range(1, n) if row["loss_mask"][0, at + t]]
        at += n
    near(total / weight, np.mean(want))


def microbatches_are_divided_by_the_weight_of_all():
    batch = {"x": jnp.asarray([1.0, 3.0, 3.0, 3.0]), "mask": jnp.asarray([True, True, False, True])}

    def loss(params, batch, key):
        total = jnp.sum(jnp.where(batch["mask"], params * batch["x"], 0))
        return {"loss": (1.0, total, jnp.sum(batch["mask"]).astype(float))}, {}

    found, _ = update.gradients(loss, jnp.float32(1.0), batch, jax.random.key(0), 2, jnp.float32)
    near(found, 7 / 3)


MUTATIONS = (
    Mutation("constant PRNG", rollout, "[seed % 2**64, stream, step]", "[seed % 2**64, stream, 0]",
             every_step_draws_anew),
    Mutation(
        "one draw for all samples of a prompt", rollout, "[place * samples + rank for", "[place for",
        samples_of_a_prompt_differ,
    ),
    Mutation(
        "EOS off by one: the stop token is cut off", engine, "new = slice(known, count[b])",
        "new = slice(known, count[b] - finished[b])", a_response_ends_with_its_first_stop_token,
    ),
    Mutation(
        "EOS off by one: a token after the stop is kept", slots, "jnp.any(ids_R[:, None] == s.stop_ids_RS, axis=-1)",
        "jnp.any(slots.pending_B[slot_R, None] == s.stop_ids_RS, axis=-1)",
        what_would_follow_the_stop_changes_nothing, compiled=True,
    ),
    Mutation(
        "EOS off by one: the stop token is not learned", rollout, "[*[False] * before, *c.sampled]",
        "[*[False] * before, *c.sampled[:-1], False]", a_response_ends_with_its_first_stop_token,
    ),
    Mutation(
        "a stop token in the prompt counts", requests, "self.ids[-1] in self.stops",
        "not {*self.prompt, *self.ids}.isdisjoint(self.stops)", a_response_ends_with_its_first_stop_token,
    ),
    Mutation(
        "the limit counts as a stop", requests, 'reason = "stop" if cut or stop else "length"', 'reason = "stop"',
        a_response_ends_with_its_first_stop_token,
    ),
    Mutation(
        "who ended did not", rollout, 'finish_reason == "stop"', 'finish_reason == "length"',
        a_response_ends_with_its_first_stop_token,
    ),
    Mutation(
        "prompt tokens unmasked", rollout, "[*[False] * before, *c.sampled]", "[*[True] * before, *c.sampled]",
        only_what_the_policy_sampled_is_trained_on,
    ),
    Mutation(
        "tool tokens unmasked", rollout, "[*[False] * before, *c.sampled]", "[*[False] * before, *[True] * len(c.ids)]",
        only_what_the_policy_sampled_is_trained_on,
    ),
    Mutation(
        "positions not reset at a document boundary", rollout, "np.arange(span.stop - at), number",
        "np.arange(at, span.stop), number", segments_begin_at_zero_and_see_only_themselves,
    ),
    Mutation(
        "packed sequences see each other", rollout, "np.arange(span.stop - at), number", "np.arange(span.stop - at), 1",
        segments_begin_at_zero_and_see_only_themselves,
    ),
    Mutation(
        "temperature dropped in scoring", policy, "tail(batch.temperature), entropy=True", "None, entropy=True",
        scores_are_those_of_the_next_token_at_its_temperature,
    ),
    Mutation(
        "shift off by one", policy, "hidden, tail(batch.tokens), chunk", "hidden, batch.tokens[:, :-1], chunk",
        scores_are_those_of_the_next_token_at_its_temperature,
    ),
    Mutation("dropout on in a reward model's scores", reward, "segments, key)\n    return masked.at_last",
             'segments, __import__("jax").random.key(0))\n    return masked.at_last', a_reward_knows_no_dropout),
    Mutation("dropout on where a reward model is evaluated", reward, "scores(model, params, batch), batch)",
             'scores(model, params, batch, __import__("jax").random.key(0)), batch)', a_reward_knows_no_dropout),
    Mutation("dropout on in the critic's values", policy,
             "batch.positions[:, :-1], batch.segments[:, :-1])\n\n\ndef make_loss",
             "batch.positions[:, :-1], batch.segments[:, :-1],\n        jax.random.key(0))\n\n\ndef make_loss",
             a_critic_knows_no_dropout),
    Mutation("dropout on in the reference of preferences", preference, "response_logprobs(*reference, batch, chunk)",
             "response_logprobs(*reference, batch, chunk, jax.random.key(0))",
             preferences_are_measured_without_dropout),
    Mutation("dropout on where preferences are measured", preference,
             "response_logprobs(model, params, batch, chunk, key)",
             "response_logprobs(model, params, batch, chunk, jax.random.key(0) if key is None else key)",
             preferences_are_measured_without_dropout),
    Mutation("fine-tuning on every token", pretrain, "batch.loss_mask[:, 1:], *marked",
             "batch.segments[:, 1:] > 0, *marked", fine_tuning_counts_what_is_to_be_trained_on),
    Mutation("shift off by one in fine-tuning's mask", pretrain, "batch.loss_mask[:, 1:], *marked",
             "batch.loss_mask[:, :-1], *marked", fine_tuning_counts_what_is_to_be_trained_on),
    Mutation("conversations of a row see each other", pretrain, "batch.segments[:, :-1], key=key",
             "jnp.minimum(batch.segments[:, :-1], 1), key=key", fine_tuning_counts_what_is_to_be_trained_on),
    Mutation(
        "dropout on in scoring", policy, "batch.segments[:, :-1]\n    )\n    logprobs",
        "batch.segments[:, :-1], key=jax.random.key(0)\n    )\n    logprobs",
        scores_are_those_of_the_next_token_at_its_temperature,
    ),
    Mutation("padded vocabulary unmasked", transformer, "jnp.where(column < cfg.vocab_size, logits, MASKED)",
             "logits", padded_columns_have_no_probability),
    Mutation("padded vocabulary off by one", transformer, "column < cfg.vocab_size", "column <= cfg.vocab_size",
             padded_columns_have_no_probability),
    Mutation("groups shuffled", learn, "totals, groups_N, np.ones", "totals, np.roll(groups_N, 1), np.ones",
             credit_goes_to_its_own_group),
    Mutation("integer rewards, in the rows", learn, "x, np.float32) for c, x in zip(columns, scores_N)",
             "x, np.int32) for c, x in zip(columns, scores_N)", credit_goes_to_its_own_group),
    Mutation("credit for what a tool wrote", learn, 'np.where(c["sampled_by_policy"], x, 0)',
             'np.where(c["tokens"] > 0, x, 0)', credit_goes_to_its_own_group),
    Mutation("reference aliased to the policy", learn, "learner.refer, reference, batch",
             "learner.refer, s.params, batch", the_reference_stays_where_it_was),
    Mutation("1/accumulation missing", update, "c * s / jnp.maximum(weights[name], 1) for name, (c, s, _)",
             "c * s / jnp.maximum(w, 1) for name, (c, s, w)", microbatches_are_divided_by_the_weight_of_all),
)  # fmt: skip


test_is_noticed, test_the_swap_alone_breaks_nothing = mutation_tests(MUTATIONS)
