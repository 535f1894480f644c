"""The wrongs that a run can put between the rewards of its samples and the update: the check beside each notices."""

import dataclasses
import types
from unittest import mock

import numpy as np

from jaxlm.optim.optimizers import AdamW
from jaxlm.rl.rewards import Subtract
from jaxlm.run import rl, rl_rewards
from jaxlm.run.goodput import Clock
from jaxlm.steps import learn
from jaxlm.steps.policy import DR_GRPO
from jaxlm.steps.update import Train
from tests.rl.mutate import Mutation, mutation_tests
from tests.steps.test_mutations import MODEL, ONE, PARAMS, SAMPLE, gone_on, kl_of_the_sample, near

OBJECTIVE = dataclasses.replace(DR_GRPO, samples=2)
CUT = dataclasses.replace(
    SAMPLE,
    reply=dataclasses.replace(
        SAMPLE.reply, completion=dataclasses.replace(SAMPLE.reply.completion, finish_reason="length")
    ),
)


def step(rewards, process=None):
    """(columns, metrics) of what a trainer's step gives to the update, two samples to a prompt."""
    found = [dataclasses.replace(SAMPLE, place=i // 2, rank=i % 2) for i in range(len(rewards))]
    s = gone_on()
    s.step, s.kl_coefficient = 0, 0.0
    trainer = types.SimpleNamespace(
        p=OBJECTIVE, tools=None, clock=Clock(phase="host"), between=lambda: None,
        reference=PARAMS, process=lambda samples: process,
        roll=lambda s, n: rl.Rolled(found, [None] * len(found), {}),
        scoring=types.SimpleNamespace(begin_step=lambda n: None, rewards=lambda found, n: rewards, seen={}),
        learner=learn.Learner(OBJECTIVE, MODEL, None, AdamW(), None, Train(batch_size=len(found)), 12, 0, ONE),
    )  # fmt: skip
    with mock.patch.object(learn, "learn", side_effect=lambda learner, s, columns, n: (s, {})) as update:
        _, metrics, _ = rl.Trainer._step(trainer, s, 0)
    return update.call_args.args[2], metrics


def rewards_reach_the_update_as_they_are():
    """.7 and -.3 are no integers; what cannot be scored is left out, and not 0."""
    columns, metrics = step([0.7, -0.3, 0.4, None, 0.1, 0.9])
    near([c["advantages"][2] for c in columns], [0.5, -0.5, 0, -0.4, 0.4])
    near([metrics["reward"], metrics["unscored"]], [0.36, 1 / 6])


def process_rewards_reach_the_update():
    """Sums of 1.2 and -.3, half their difference each; a tool's token, at 3, earns nothing."""
    process = [np.zeros(5, np.float32) for _ in range(2)]
    process[0][2], process[0][3], process[0][4] = 0.25, 9.0, 0.25
    columns, metrics = step([0.7, -0.3], process)
    near([c["advantages"][4] for c in columns], [0.75, -0.75])
    near(metrics["reward"], 0.2)
    process[0][3] = 0
    near(step([0.7, -0.3], process)[1]["reward/process"], 0.25)


def the_reference_is_not_the_policy():
    _, metrics = step([0.7, -0.3])
    near(metrics["kl/reference"], kl_of_the_sample())


def a_missing_stop_costs_what_it_should():
    objective = dataclasses.replace(OBJECTIVE, missing_stop=Subtract(0.5))
    scoring = types.SimpleNamespace(_objective=objective, reward=lambda *_: [0.7, -0.3, None])
    ended, cut, unknown = rl.Scoring.rewards(scoring, [SAMPLE, CUT, CUT], 0)
    near([ended, cut], [0.7, -0.8])
    assert unknown is None


MUTATIONS = (
    Mutation("integer rewards, on the host", rl, "np.array([r for _, r in valid], np.float32)",
             "np.array([r for _, r in valid], np.int32)", rewards_reach_the_update_as_they_are),
    Mutation("integer rewards, where a stop is missing", rl_rewards,
             "np.array([0.0 if v is None else v for v in values])",
             "np.array([0.0 if v is None else v for v in values], int)", a_missing_stop_costs_what_it_should),
    Mutation("the penalty for a missing stop goes to those who stopped", rl_rewards,
             "np.array([s.ended for s in found])", "np.array([not s.ended for s in found])",
             a_missing_stop_costs_what_it_should),
    Mutation("what cannot be scored counts as 0", rl, "zip(rolled.samples, rewards) if r is not None",
             "zip(rolled.samples, [r or 0.0 for r in rewards])", rewards_reach_the_update_as_they_are),
    Mutation("every sample is a group of its own", rl, "np.array([x.place for x in samples])",
             "np.arange(len(samples))", rewards_reach_the_update_as_they_are),
    Mutation("process rewards are lost", rl, "            process,\n", "            None,\n",
             process_rewards_reach_the_update),
    Mutation("process rewards of what a tool wrote", learn, "*mask.shape).rewards * mask", "*mask.shape).rewards",
             process_rewards_reach_the_update),
    Mutation("reference aliased to the policy", rl, "            self.reference,\n            [rollout.columns",
             "            s.params,\n            [rollout.columns", the_reference_is_not_the_policy),
)  # fmt: skip


test_is_noticed, test_the_swap_alone_breaks_nothing = mutation_tests(MUTATIONS)
