"""A trained reward model as a reward function, and the scale that its scores are put on.

Raw scores are known up to a constant, for only differences are trained, and their spread says how sure the model is.
When training is done, gain and bias are chosen so that reference responses have mean 0 and standard deviation 1
(Ziegler et al. 2019), and kept in the run's `reward.json`. The reference responses are those of the held-out prompts,
which the model has not fitted; `set_scale` takes others, such as a policy's own.

B rows, T length (a bucket), S answers that a row holds at most.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxlm import masked, sharding, storage
from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.loader import evaluation_batches
from jaxlm.feedback.judge import asked
from jaxlm.feedback.preferences import Answer, Preference, encode
from jaxlm.feedback.scoring import Reward
from jaxlm.feedback.verifiers import message_of
from jaxlm.nn import heads, lora
from jaxlm.rl.rewards import gain_and_bias
from jaxlm.run.load import Run, load_any, load_experiment
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import MIN_PROMPT_BUCKET, bucket
from jaxlm.sample.slots import layout
from jaxlm.steps import reward

SCHEMA_VERSION = 1
FILE = "reward.json"
ROWS = 16  # scored at a time: a fixed number, so that a score does not hang on how many there are


# --------------------------------------------------------------------------------------------------------- the scale
@dataclasses.dataclass(frozen=True)
class Scale:
    """gain * score + bias; of the parameters of `step`, from so many `responses`."""

    gain: float
    bias: float
    step: int
    responses: int


def _write(workdir, scores: Sequence[float], step: int) -> Scale:
    scale = Scale(*gain_and_bias(scores), step, len(scores))
    if jax.process_index() == 0:
        record = {"schema_version": SCHEMA_VERSION} | dataclasses.asdict(scale)
        storage.write_json(storage.path(workdir) / FILE, record)
    return scale


def read_scale(workdir) -> Scale:
    """What `reward.json` says; `UserError` where there is none, as before the end of training."""
    file = storage.path(workdir) / FILE
    if not file.exists():
        raise UserError(f"{workdir} has no {FILE}: its training is not done; start the same command again")
    record = storage.read_json(file)
    if (version := record.pop("schema_version", None)) != SCHEMA_VERSION:
        raise UserError(f"{file} has schema_version {version}, this jaxlm reads {SCHEMA_VERSION}")
    return Scale(**record)


def write_scale(e, mesh, params, valid: dict, workdir, step: int) -> None:
    """Scores every held-out answer and writes `reward.json`, unless it is of this step already."""
    file = storage.path(workdir) / FILE
    if file.exists() and read_scale(workdir).step == step:
        return
    whole = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=(whole, whole))
    def score(params, batch):
        return reward.scores(e.model, lora.attach(e.lora, params), batch), reward.present(batch)

    found = []
    with jax.set_mesh(mesh):
        for packed in valid.values():
            for batch in evaluation_batches(packed, e.evaluation.batch_size, mesh):
                scores_BS, present_BS = map(np.asarray, score(params, batch))
                found += scores_BS[present_BS].tolist()
    _write(workdir, found, step)


# -------------------------------------------------------------------------------------------------------- the scores
@functools.partial(jax.jit, static_argnames=("cfg",))
def last_rewards(cfg, params, tokens_BT, lengths_B):
    """[B]: the raw reward at the last token of right-padded rows, whole on every device."""
    positions_BT, segments_BT = layout(tokens_BT, lengths_B)
    rewards_BT = heads.scalars(cfg, params, "reward", tokens_BT, positions_BT, segments_BT)
    return sharding.constrain(masked.at_last(rewards_BT, segments_BT > 0, segments_BT, 1)[:, 0], (None,))


def rows_at_once(mesh) -> int:
    """A multiple of `ROWS` that a mesh can spread."""
    return ROWS if mesh is None else math.lcm(ROWS, mesh.shape["replica"] * mesh.shape["fsdp"])


def raw_scores(run: Run, sequences: Sequence[Sequence[int]], mesh=None) -> list[float]:
    """The raw reward at the last of each sequence's ids. They run in batches of `ROWS` of one length bucket, so that a
    score depends on its own sequence alone, bit for bit."""
    out = [0.0] * len(sequences)
    by_length: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        if not sequence:
            raise UserError("there is nothing to score in a sequence without tokens")
        by_length.setdefault(bucket(len(sequence), MIN_PROMPT_BUCKET), []).append(i)
    rows = rows_at_once(mesh)
    for T, members in sorted(by_length.items()):
        for first in range(0, len(members), rows):
            tokens_BT, lengths_B = np.zeros((rows, T), np.int32), np.zeros(rows, np.int32)
            for b, i in enumerate(members[first : first + rows]):
                lengths_B[b] = len(sequences[i])
                tokens_BT[b, : lengths_B[b]] = sequences[i]
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                scores = np.asarray(last_rewards(run.model, run.params, tokens_BT, lengths_B))
            for i, score in zip(members[first : first + rows], scores.tolist()):
                out[i] = score
    return out


def _ids(run: Run, prompt, completion, tokenizer_hash: str | None) -> list[int] | None:
    """Ids of a prompt with its answer, None where they do not fit or cannot be encoded."""
    prompt = asked(prompt) if isinstance(prompt, str) else prompt
    message = Message("assistant", completion) if isinstance(completion, str) else message_of(completion)
    if message is None or not isinstance(prompt, Conversation):
        return None
    answer = Answer(message)
    if isinstance(completion, Reply):
        c = completion.completion
        answer = Answer(message, c.ids, c.sampled, tokenizer_hash)
    try:
        encoded = encode(Preference(prompt, (answer,), (0,), "reward"), run.tokenizer, run.experiment.data.context)
    except UserError:
        return None
    return [*encoded.prompt, *encoded.answers[0]]


def load_reward(workdir, mesh=None) -> tuple[Run, Scale]:
    """A reward model's run at the checkpoint that its scale is of, and the scale; `UserError` where it is none."""
    _require(workdir)
    scale = read_scale(workdir)
    return load_any(workdir, scale.step, mesh), scale


def _require(workdir) -> None:
    if "reward" not in load_experiment(workdir).heads:
        raise UserError(f"{workdir} is no reward model: it was not trained with objective=RewardModel")


def reward_function(workdir, tokenizer_hash: str | None = None, mesh=None) -> Reward:
    """The trained model as a plain function (prompts, completions, metadata) -> list of float or None.

    A prompt is a conversation, or text as the user's; a completion is what verifiers take: text, a message, a
    conversation that ends with one, a reply. A prompt too long for the model loses its oldest exchanges; None: it does
    not fit even so, or cannot be encoded.

    tokenizer_hash: the policy's. Where it is the reward model's own, replies are scored by the ids that were sampled;
    otherwise they are rendered and end their turn.
    """
    run, scale = load_reward(workdir, mesh)

    def trained_reward(prompts, completions, metadata) -> list[float | None]:
        rows = [_ids(run, p, c, tokenizer_hash) for p, c in zip(prompts, completions, strict=True)]
        found = [i for i, ids in enumerate(rows) if ids]
        out: list[float | None] = [None] * len(rows)
        for i, raw in zip(found, raw_scores(run, [rows[i] for i in found], mesh), strict=True):
            out[i] = scale.gain * raw + scale.bias if math.isfinite(raw) else None
        return out

    return trained_reward


def set_scale(workdir, prompts: Sequence, completions: Sequence, tokenizer_hash: str | None = None) -> Scale:
    """Puts the run's scores on another scale: mean 0 and standard deviation 1 on these responses. A run that has no
    scale yet gets its first one, of its newest parameters."""
    _require(workdir)
    run = load_any(workdir, read_scale(workdir).step if (storage.path(workdir) / FILE).exists() else None)
    rows = [_ids(run, p, c, tokenizer_hash) for p, c in zip(prompts, completions, strict=True)]
    return _write(workdir, raw_scores(run, [ids for ids in rows if ids]), run.step)
