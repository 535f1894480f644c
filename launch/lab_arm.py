"""The stages of one seed of launch.lab: policy, gold, samples, labels, proxies, best-of-n, reinforcement learning.

P prompts, N samples of each, L longest answer in tokens.
"""

import dataclasses
import io
from collections.abc import Sequence

import jax
import numpy as np

from experiments.lab import Arm, Lab
from jaxlm import rng, storage
from jaxlm.data import prompts
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.conversation import Message, prompt_ids
from jaxlm.feedback import records as feedback
from jaxlm.feedback.judge import asked
from jaxlm.feedback.pairwise import tiers_of
from jaxlm.feedback.scoring import scores
from jaxlm.feedback.store import Store
from jaxlm.interop.workdir import write_run, written_whole
from jaxlm.nn import heads
from jaxlm.run import lineage, load, reward
from jaxlm.run.experiment import Experiment
from jaxlm.run.log import read_metrics
from jaxlm.run.policy import policy_of
from jaxlm.run.stages import Stage
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion
from jaxlm.steps import rollout
from jaxlm.steps.rollout import Sample, Sampler
from launch.training import training

LABELS, POOL = 1, 2  # draws of their own, beside those of a run's evaluations
SLOTS = 256  # answers decoded at once: many and short
REFERENCE = 16  # samples of each prompt that the rewards' scales are set on


# ------------------------------------------------------------------------------------------------------- the policy
def task_of(a: Arm) -> Experiment:
    """A definition that asks what all of the arm ask."""
    return next(iter(a.rl.values()))[1]


def sampled(a: Arm, root, stream: int, chosen: Sequence[prompts.Prompt], samples: int) -> list[Sample]:
    """Samples of the policy as the reinforcement learning begins with it."""
    run, e = load.load_run(root / "policy"), task_of(a)
    p = e.objective
    sampler = Sampler(run.model, run.tokenizer, e.data.context, p.max_tokens, slots=SLOTS)
    seed = rollout.seed_of(e.seed, rng.EVAL, stream)
    return rollout.sample(sampler, run.params, chosen, samples, p.temperature, seed)


# --------------------------------------------------------------------------------------------------------- the gold
def make_gold(a: Arm, root) -> dict:
    """Writes the gold as a run whose parameters are those that it began with."""
    tokenizer = tokenizers.load(root / "policy" / "tokenizer")
    prompt_ids(asked(prompts.heldout(task_of(a).data, 1)[0].asked), tokenizer)  # a few letters cannot spell the roles
    lineage.check_same_experiment(root / "gold", a.gold)
    if not (root / "gold").exists():
        model = dataclasses.replace(a.gold.model, vocab_size=tokenizer.vocab_size)
        params = jax.jit(lambda: heads.init(model, None, jax.random.key(a.gold.seed), a.gold.heads))()
        with written_whole(root / "gold") as folder:
            tokenizer.save(folder / "tokenizer")
            write_run(folder, a.gold, params, {"tokenizer": tokenizer.hash})
    return {"parameters": sum(x.size for x in jax.tree.leaves(load.load_any(root / "gold").params))}


def gold(x: Lab, network, verdict):
    """What is wanted of answers: the network's number, less the price of what is not in the task's language."""
    return network - x.language * (1 - verdict)


# ---------------------------------------------------------------------------------------------------------- samples
@dataclasses.dataclass(frozen=True)
class Pool:
    """P * N answers, those of a prompt together; tokenizer: its hash."""

    prompts: list[str]  # of each answer
    replies: list[Reply]
    shape: tuple[int, int]
    tokenizer: str


def draw_pool(x: Lab, a: Arm, root) -> dict:
    """Samples the answers that best-of-n chooses from, and sets the gold's scale on some of them."""
    chosen = prompts.heldout(task_of(a).data, x.prompts)
    found = sampled(a, root, POOL, chosen, x.samples)
    L = max(len(s.reply.completion.ids) for s in found)
    ids = np.full((len(found), L), tokenizers.PAD, np.int32)
    for row, s in zip(ids, found):
        row[: len(s.reply.completion.ids)] = s.reply.completion.ids
    file = io.BytesIO()
    np.savez_compressed(file, ids=ids, prompts=[p.asked for p in chosen])
    storage.write_bytes(root / "pool.npz", file.getvalue())
    pool = read_pool(root)
    set_scale(pool, root / "gold")
    lengths = [s.length for s in found]
    return {"identity": storage.sha256_file(root / "pool.npz"), "length": float(np.mean(lengths)),
            "ended": float(np.mean([s.ended for s in found])),
            "surprisal": float(-np.mean([sum(s.reply.completion.logprobs) for s in found]))}  # fmt: skip


def read_pool(root) -> Pool:
    with np.load(io.BytesIO((root / "pool.npz").read_bytes())) as file:
        ids, texts = file["ids"], file["prompts"].tolist()
    tokenizer = tokenizers.load(root / "policy" / "tokenizer")
    N, replies = len(ids) // len(texts), []
    for row in ids:
        said = tuple(row[row != tokenizers.PAD].tolist())
        text = tokenizer.decode(said)
        completion = Completion(said, (0.0,) * len(said), text, "stop", (True,) * len(said))
        replies.append(Reply(Message("assistant", text), completion))
    return Pool([t for t in texts for _ in range(N)], replies, (len(texts), N), tokenizer.hash)


def set_scale(pool: Pool, workdir) -> None:
    """Mean 0 and standard deviation 1 on samples of the policy."""
    at = [p * pool.shape[1] + i for p in range(pool.shape[0]) for i in range(min(REFERENCE, pool.shape[1]))]
    reward.set_scale(workdir, [pool.prompts[i] for i in at], [pool.replies[i] for i in at], pool.tokenizer)


def score_pool(pool: Pool, workdir) -> np.ndarray:
    """Float64 [P, N]: what a reward model gives each answer."""
    learned = reward.reward_function(workdir, pool.tokenizer)
    values = scores(learned, pool.prompts, pool.replies, [{}] * len(pool.replies), None)
    return np.array(values, np.float64).reshape(pool.shape)


# ----------------------------------------------------------------------------------------------------------- labels
def make_labels(x: Lab, a: Arm, root) -> dict:
    """Two samples of the policy to each prompt, the one with the higher gold reward first: a store for each number of
    labels, of which a larger one begins with a smaller one's."""
    most = max(a.proxy)
    e = task_of(a)
    chosen = [prompts.at(e.data, "train", e.seed, i) for i in range(most)]
    found = sampled(a, root, LABELS, chosen, 2)
    tokenizer_hash = tokenizers.load(root / "policy" / "tokenizer").hash
    given = [s.prompt.asked for s in found], [s.reply for s in found], [{}] * len(found)
    network = scores(reward.reward_function(root / "gold", tokenizer_hash), *given, None)
    values = gold(x, np.array(network), np.array(scores(prompts.reward_of(e.data), *given, None))).tolist()
    about, records = policy_of(load.load_run(root / "policy")), []
    for i, p in enumerate(chosen):
        prompt = feedback.Prompt(asked(p.asked), {"label": i})
        pair, gave = found[2 * i : 2 * i + 2], values[2 * i : 2 * i + 2]
        id = feedback.record_id(prompt)
        responses = [
            feedback.Response(
                id, s.reply.message, s.reply.completion.ids, s.reply.completion.logprobs, s.reply.completion.sampled,
                tokenizer_hash, about, {"rank": s.rank}, s.reply.completion.finish_reason, time="",
            )
            for s in pair
        ]  # fmt: skip
        ids = [feedback.record_id(r) for r in responses]
        if ids[0] == ids[1]:  # the same answer twice: there is nothing to choose
            continue
        tiers = tuple(tuple(ids[i] for i in tier) for tier in tiers_of(gave))
        ranking = feedback.Ranking(id, tuple(ids), tiers, "gold", {"scores": gave}, time="")
        records.append((prompt, *responses, ranking))
    for count in a.proxy:
        file = root / f"labels_{count}.db"
        file.unlink(missing_ok=True)
        with Store(file) as store:
            store.add(*(r for pair in records[:count] for r in pair))
    return {"identity": [feedback.record_id(r[-1]) for r in records]}


# ------------------------------------------------------------------------------------------------------------ proxy
def train_proxy(e: Experiment, own: Experiment, workdir, pool: Pool) -> dict:
    done = training(e, own, workdir)
    set_scale(pool, workdir)
    return done


def score_all(x: Lab, a: Arm, root) -> dict:
    """Every answer of the pool by the gold, by each proxy and by the task's own verdict, in `scores.npz`."""
    pool = read_pool(root)
    verdict = prompts.reward_of(task_of(a).data)
    values = scores(verdict, pool.prompts, pool.replies, [{}] * len(pool.replies), None)
    found = {"verifier": np.array(values, np.float64).reshape(pool.shape)}
    found["gold"] = gold(x, score_pool(pool, root / "gold"), found["verifier"])
    found |= {f"proxy_{count}": score_pool(pool, root / f"proxy_{count}") for count in a.proxy}
    file = io.BytesIO()
    np.savez_compressed(file, **found)
    storage.write_bytes(root / "scores.npz", file.getvalue())
    return {"identity": storage.sha256_file(root / "scores.npz")}


def read_scores(root) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO((root / "scores.npz").read_bytes())) as file:
        return {name: file[name] for name in file.files}


# ------------------------------------------------------------------------------------------- reinforcement learning
RECORD = {
    "proxy": "reward/learned_0", "verifier": "reward/correct", "kl": "kl/reference", "length": "length/mean",
    "repetition": "repetition", "entropy": "surprisal",
}  # fmt: skip
NETWORK = "reward/learned_1"


def curve(x: Lab, workdir) -> list[dict]:
    """The run's records under the names that fits, alarms and plots know. gold_error: of a batch's mean, at most, as
    the deviation of a sum is at most the sum of the deviations."""
    found, batch = [], load.load_experiment(workdir).train.batch_size
    for r in (r for r in read_metrics(workdir) if "train/reward" in r):
        own = {name: r[f"train/{metric}"] for name, metric in RECORD.items()}
        deviation = r[f"train/{NETWORK}/std"] + x.language * r[f"train/{RECORD['verifier']}/std"]
        own |= {"gold": gold(x, r[f"train/{NETWORK}"], own["verifier"]), "gold_error": deviation / batch**0.5}
        found.append({"step": r["step"], "d": max(own["kl"], 0.0) ** 0.5} | own)
    return found


def stages(x: Lab, a: Arm, own: Arm, root) -> list[Stage]:
    """What there is to do in the folder `root`; `own` is the arm as it ships."""

    def stage(name: str, about: str, result) -> Stage:
        return Stage(name, about, lambda done, anew: result())

    def proxy(count: int):
        return lambda: train_proxy(a.proxy[count], own.proxy[count], root / f"proxy_{count}", read_pool(root))

    def learning(name: str):
        return lambda: training(a.rl[name][1], own.rl[name][1], root / name)

    found = [
        stage(
            "policy", f"reading, {a.policy.train.steps} steps", lambda: training(a.policy, own.policy, root / "policy")
        ),
        stage("gold", "drawing a network", lambda: make_gold(a, root)),
        stage("pool", f"{x.samples} answers to each of {x.prompts} prompts", lambda: draw_pool(x, a, root)),
        stage("labels", f"{max(a.proxy)} choices by the gold", lambda: make_labels(x, a, root)),
    ]
    for count, e in a.proxy.items():
        found.append(stage(f"proxy_{count}", f"{count} labels, {e.train.steps} steps", proxy(count)))
    found.append(stage("scores", "the answers by every reward", lambda: score_all(x, a, root)))
    for name, (count, e) in a.rl.items():
        penalty = "" if e.objective.kl is None else ", with a KL penalty"
        found.append(stage(name, f"{e.train.steps} steps against the proxy of {count} labels{penalty}", learning(name)))
    return found
