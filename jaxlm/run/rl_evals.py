"""What a policy can do on prompts that it does not train on, asked on the way, and whether a run is worth its time."""

import json

import jax
import numpy as np

from jaxlm import rng, storage
from jaxlm.config import UserError
from jaxlm.data import prompts
from jaxlm.data.conversation import Message
from jaxlm.feedback import parts, reasoning, shaping
from jaxlm.feedback.passk import majority_rate, pass_rates
from jaxlm.feedback.verifiers import MARK, final_answer, number
from jaxlm.run import preflight as checks
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion
from jaxlm.sample.parity import certificate
from jaxlm.steps import rollout
from jaxlm.steps.policy import PolicyGradient
from jaxlm.steps.rollout import Sample

SAID = 3  # samples of an evaluation that are kept to be read


def _mean(values) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else 0.0


def is_right(verdict: float | None) -> bool:
    return verdict is not None and verdict >= 1.0


def sampled(trainer, s, count: int, samples: int, temperature: float, where: str) -> tuple[list[Sample], list]:
    """(samples of the first held-out prompts, the task's verdicts); the same draws at every evaluation."""
    asked = prompts.heldout(trainer.e.data, count)
    seed = rollout.seed_of(trainer.e.seed, rng.EVAL, 0)
    found = rollout.sample(trainer.sampler, trainer.acting(s), asked, samples, temperature, seed)
    return found, trainer.scoring.verdicts(found, where)


CORRECTIONS = ("changed", "better", "worse", "first_right", "last_right")


def names(p: PolicyGradient, verdicts: bool) -> list[str]:
    """What an evaluation measures; `eval/thinking/` only where replies think and truths are numbers.

    verdicts: whether the task can say what is right (`prompts.answered`).
    """
    k = p.heldout_samples
    told = ["pass@1", f"pass@{k}", f"majority@{k}", "greedy", "score", "greedy_score"] if verdicts else []
    found = [*told, "reward", *(["gold"] if p.gold is not None else []), "length", "eos_rate"]
    return [f"eval/{n}" for n in dict.fromkeys([*found, *(f"thinking/{c}" for c in CORRECTIONS)])]


class Evaluation:
    """The evaluation of a run: (step, state) -> minus a mean over the held-out samples, so that lower is better.

    It is the mean of the part of the reward that `objective.gold` names. Where that names none, it is that of the
    task's verdict. Where the task has no verdicts either (`prompts.answered`), it is that of what is maximized.

    Writes `eval/`. Where the task has verdicts: `pass@1`, `pass@k` and `majority@k` of the samples at the training
    temperature, `greedy` of the likeliest reply, `score` and `greedy_score`, the verdict where there is more than right
    and wrong. Always: `reward`, what is maximized, `length` and `eos_rate`. `gold` where `objective.gold` names a part;
    where replies think and truths are numbers `thinking/`, what becomes of the answer on the way. And a few samples to
    `samples/`. watch: a sink of these besides the log.
    """

    def __init__(self, e, trainer, log, progress, watch, root):
        self._p, self._trainer, self._log, self._root = e.objective, trainer, log, root
        self._progress, self._watch = progress, watch

    def __call__(self, n: int, s) -> float:
        p, t = self._p, self._trainer
        found, verdicts = sampled(t, s, p.heldout_prompts, p.heldout_samples, p.temperature, "eval")
        greedy, greedy_verdicts = sampled(t, s, p.heldout_prompts, 1, 0.0, "greedy")
        columns = np.reshape([is_right(v) for v in verdicts], (-1, p.heldout_samples))
        rates = pass_rates(columns.tolist(), sorted({1, p.heldout_samples}))
        votes = np.reshape([final_answer(x.reply) for x in found], columns.shape)
        # With its verdict, should the same words ever have two.
        votes = [[None if v is None else (v, r) for v, r in zip(*pair)] for pair in zip(votes, columns.tolist())]
        told = {f"eval/pass@{k}": rate.value for k, rate in rates.items()} | {
            f"eval/majority@{p.heldout_samples}": majority_rate(votes, columns.tolist()).value,
            "eval/greedy": float(np.mean([is_right(v) for v in greedy_verdicts])),
            "eval/score": _mean(verdicts),
            "eval/greedy_score": _mean(greedy_verdicts),
        }
        known = prompts.answered(t.e.data)
        values = (told if known else {}) | {
            "eval/reward": _mean(t.scoring.rewards(found, "eval")),
            **({} if p.gold is None else {"eval/gold": _mean(t.scoring.seen[p.gold])}),
            "eval/length": float(np.mean([x.length for x in found])),
            "eval/eos_rate": float(np.mean([x.ended for x in found])),
        }
        values |= _corrections(found)
        self._log.write(n, values)
        self._progress.note(n, values)
        self._watch(n, values)
        self._keep(n, [*found[:: p.heldout_samples][:SAID], *greedy[:SAID]], t)
        return -values["eval/gold" if p.gold is not None else "eval/score" if known else "eval/reward"]

    def _keep(self, n: int, found: list[Sample], trainer) -> None:
        if jax.process_index() != 0:
            return
        said = [
            {"prompt": x.prompt.id, "temperature": x.temperature, "finish_reason": x.reply.completion.finish_reason,
             "asked": trainer.sampler.tokenizer.decode(x.prompt_ids),
             "said": "".join(trainer.sampler.tokenizer.pieces(x.reply.completion.ids))}
            for x in found
        ]  # fmt: skip
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in said)
        storage.write_text(self._root / "samples" / f"{n:08d}.jsonl", lines)


def _corrections(found: list[Sample]) -> dict[str, float]:
    """How often an answer changes inside the thinking, and for better, where replies think and truths are numbers."""
    traces, places = [], []
    for x in found:
        thinking = [part.text for part in x.reply.message.parts if part.kind == "thinking"]
        truth = number(str(x.prompt.metadata.get("answer", "")).rpartition(MARK)[2])
        if thinking and truth is not None:
            traces.append(reasoning.traced("\n".join(thinking), lambda v, truth=truth: v == truth))
            places.append(x.place)
    if not traces:
        return {}
    rates = reasoning.self_correction(traces, places)
    return {f"eval/thinking/{k}": rates[k]["value"] for k in CORRECTIONS if rates[k] is not None}


# ------------------------------------------------------------------------------------------------------- preflight
def preflight(e, trainer, s, progress, root) -> None:
    """Checks of policy, reward and prompts before the first step, to `preflight.txt`; says go or no-go and why.

    Raises `UserError` at a no-go where the definition wants that.
    """
    p = e.objective
    if p.preflight == "off":
        return
    k = max(p.samples, 2)
    found, verdicts = sampled(trainer, s, max(2, p.heldout_prompts // 4), k, p.temperature, "preflight")
    rewards = trainer.scoring.rewards(found, "preflight")
    text = isinstance(found[0].prompt.asked, str)
    thinks = any(isinstance(part, parts.Format | parts.Steps) for part in p.reward)

    def formatted(x: Sample) -> bool:
        if text or not thinks:
            return x.ended
        return shaping.well_formed(x.reply.message, bool(e.data.tools))

    records = [
        {"group": x.place, "right": None if v is None else is_right(v), "reward": r, "formatted": formatted(x),
         "truncated": not x.ended}
        for x, v, r in zip(found, verdicts, rewards, strict=True)
    ]  # fmt: skip
    done = checks.rollout_checks(records, k)
    agreement = certificate(
        e.model, trainer.acting(s), [x.prompt_ids for x in found], [x.reply.completion for x in found], p.temperature,
        mesh=trainer.mesh,
    )  # fmt: skip
    bound = 1e-3 if e.model.precision.compute == "float32" else 0.05
    done.append(checks.parity_check(agreement, bound))
    about = [
        x.prompt.metadata
        | {parts.ADDRESS: f"preflight/{x.place}/{x.rank}", "tokens": x.length, "finish_reason": "stop"}
        for x in found
    ]
    nothing = Reply(Message("assistant", ""), Completion((), (), "", "stop", ()))
    done += checks.reward_checks(
        trainer.scoring.reward, [x.prompt.asked for x in found], [x.reply for x in found], about, nothing,
        seed=e.seed, timeout=None,  # each part has its own
    )  # fmt: skip
    if not text and all(isinstance(x.prompt.metadata.get("answer"), str) for x in found):
        texts = [parts.asked_text(x.prompt.asked) for x in found]
        done.append(checks.leak_check(texts, [x.prompt.metadata["answer"] for x in found]))
    verdict = checks.Preflight(tuple(done))
    table = checks.table(verdict)
    if jax.process_index() == 0:
        storage.write_text(root / "preflight.txt", table + "\n")
    progress.say(f"preflight:\n{table}")
    if p.preflight == "stop" and not verdict.go:
        raise UserError(f"preflight says {table.splitlines()[-1]}; objective.preflight=warn goes on all the same")
