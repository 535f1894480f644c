"""What a run of reinforcement learning is rewarded for: each question asked once, by whom it concerns, and kept."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jaxlm import broadcast
from jaxlm.config import UserError
from jaxlm.data import prompts
from jaxlm.feedback import journal as journals
from jaxlm.feedback import parts
from jaxlm.feedback.journal import Journal
from jaxlm.feedback.scoring import by_sample, scores
from jaxlm.rl.rewards import for_missing_stop
from jaxlm.run import reward
from jaxlm.run.experiment import Experiment
from jaxlm.steps import rollout
from jaxlm.steps.policy import Exclude, PolicyGradient
from jaxlm.steps.rollout import Sample


class Scoring:
    """Rewards of a run: the task's own verdict, asked once a sample, and the sum of parts that is maximized.

    Reward models are spread over the mesh: every process runs them, and however long they compile. All else process 0
    asks alone, each part within the run's `reward_timeout`, and shares: so it alone has a journal to keep.
    """

    def __init__(self, e: Experiment, tokenizer, mesh, root, first: int):
        p: PolicyGradient = e.objective
        self._objective, self.step = p, first
        self.journal = Journal(root if jax.process_index() == 0 else None, first)
        self._known: dict[tuple, float | None] = {}
        self._task, self.seen = prompts.reward_of(e.data), {}
        self._ahead = [("task", self._remembered)] if by_sample(self._task) else []
        learned = {
            part.run: reward.reward_function(part.run, tokenizer.hash, mesh)
            for part in p.reward
            if isinstance(part, parts.Learned)
        }

        def journaled(name, inner):
            kept = journals.reward(self.journal, lambda: self.step, name, inner, parts.ADDRESS)
            # Of groups that are dropped nothing but the verdict is ever asked.
            if by_sample(inner) and p.dynamic is None:
                self._ahead.append((name, kept))
            return kept

        def log(values):
            self.seen = values

        def ask(inner, asked, replies, metadata, name):
            if inner in learned.values():
                return scores(inner, asked, replies, metadata, None, name)
            return broadcast.from_first(lambda: scores(inner, asked, replies, metadata, p.reward_timeout, name))

        self.reward = parts.reward(
            p.reward, self._remembered, tokenizer, bool(e.data.tools), learned, journaled, e.seed, log, ask
        )

    def _remembered(self, asked, replies, metadata) -> list[float | None]:
        keys = [(m[parts.ADDRESS], r.completion.ids) for r, m in zip(replies, metadata, strict=True)]
        if new := [i for i, key in enumerate(keys) if key not in self._known]:
            values = self._task(*([x[i] for i in new] for x in (asked, replies, metadata)))
            self._known |= {keys[i]: v for i, v in zip(new, values, strict=True)}
        return [self._known[key] for key in keys]

    def begin_step(self, step: int) -> None:
        self.step, self._known = step, {}
        self.journal.forget(step)

    @contextlib.contextmanager
    def ahead(self, n: int) -> Iterator[Callable[[list[Sample]], object]]:
        """Yields a function that takes samples of step n while others are decoded, for a thread that then asks the
        rewards which look at one sample at a time and whose values are kept. At the end it is waited for.

        It changes no value, only when it is asked for: who asks later finds it known. Nothing is raised here; what has
        failed is asked once more by who needs it, who then says so, and on every process.
        """
        failed = []

        def ask(found: list[Sample]) -> None:
            try:
                for name, reward in () if failed else self._ahead:
                    rollout.score(reward, found, n, self._objective.reward_timeout, name)
            except UserError as e:
                self._known.clear()  # or the number of the sample at fault would be that among the unknown ones
                failed.append(e)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            try:
                yield functools.partial(pool.submit, ask) if jax.process_index() == 0 else lambda found: None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def verdicts(self, found: list[Sample], where) -> list[float | None]:
        timeout = self._objective.reward_timeout
        return broadcast.from_first(lambda: rollout.score(self._remembered, found, where, timeout, "task"))

    def rewards(self, found: list[Sample], where) -> list[float | None]:
        """After what is to happen to a response without its stop token; None is left out."""
        p = self._objective
        values = rollout.score(self.reward, found, where, None, "reward")
        if p.missing_stop is None:
            return values
        if isinstance(p.missing_stop, Exclude):
            return [v if s.ended else None for v, s in zip(values, found)]
        known = np.array([0.0 if v is None else v for v in values])
        after = np.asarray(for_missing_stop(known, np.array([s.ended for s in found]), p.missing_stop))
        return [None if v is None else float(a) for v, a in zip(values, after)]
