"""The stages of the tour that make and look at the base model: from raw text to samples."""

import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import prepare
from jaxlm.data.packing import PackedSet
from jaxlm.data.sources import EmbeddedPython
from jaxlm.data.world.corpus import World
from jaxlm.nn import flops
from jaxlm.nn.transformer import attention_weights
from jaxlm.run import checkpoint, compressor, evals, exits, manifest, tasks
from jaxlm.run.experiment import Experiment
from jaxlm.run.load import Run, load_run
from jaxlm.run.log import peak_flops, read_metrics
from jaxlm.run.stages import make_room
from jaxlm.run.train import train
from jaxlm.sample import show
from jaxlm.sample.engine import Sampling, generate, next_token_distribution

COMPRESSOR_BYTES = 1 << 26  # of training text that the compressor sees: about a minute of two cores at most
SAMPLE_CHARACTERS = 220


def curate(e: Experiment) -> dict:
    found = prepare.curated(e.data)
    sources = {
        name: {k: v for k, v in source.items() if k in ("documents", "characters", "bytes", "rejected")}
        for name, source in found.sources.items()
    }
    return {"identity": found.hash, "sources": sources, "report": found.report}


def _beginnings(tokenizer, valid: dict[str, PackedSet], count: int, characters: int) -> list[str]:
    """How up to `count` of the held-out texts begin, spread over all of them: `characters` of each."""
    marks = [i for i in (tokenizer.bos, tokenizer.eos) if i is not None]
    found = []
    for packed in valid.values():
        stream = tasks.token_stream(packed)
        for part in np.split(stream, np.flatnonzero(np.isin(stream, marks))):
            text = tokenizer.decode(part[: 8 * characters].tolist()).lstrip()
            found += [text[:characters]] if len(text) >= characters else []
    return found[:: max(1, len(found) // count)][:count]


def tokenize(e: Experiment) -> dict:
    data = prepare.prepare(e.data)
    sides = {"training": data.train, "validation": data.valid}
    counts = ("rows", "tokens", "bytes", "documents")
    sets = [[n, side, *(getattr(p, c) for c in counts)] for side, found in sides.items() for n, p in found.items()]
    sample = (_beginnings(data.tokenizer, data.valid, 1, SAMPLE_CHARACTERS) or ["Nothing is long enough."])[0]
    ids = data.tokenizer.encode(sample)
    return {
        "identity": [data.tokenizer.hash, data.hashes["packed"]],
        "kind": type(e.data.tokenizer).__name__,
        "vocab_size": data.tokenizer.vocab_size,
        "sets": sets,
        "sample": sample,
        "pieces": [[show.visible(p), i] for p, i in zip(data.tokenizer.pieces(ids), ids)],
    }


def training(e: Experiment, base: Experiment, workdir, anew: bool) -> dict:
    """Trains, or goes on training, in `workdir`; `base` is what the definition is compared with."""
    if anew:
        make_room(workdir)
    code = train(e, workdir, base)
    if code != exits.EXIT_DONE:
        raise exits.Stopped
    step = checkpoint.newest(workdir)
    records = read_metrics(workdir)
    speeds = {
        k: statistics.median([r[f"train/{k}"] for r in records if f"train/{k}" in r] or [0.0])
        for k in ("tokens_per_second", "model_flops_utilization")
    }
    first = next((r["train/seconds_to_first_step"] for r in records if "train/seconds_to_first_step" in r), None)
    model = load_run(workdir, step).model
    peak, how = peak_flops(model.precision.compute)
    return {
        "identity": manifest.read(workdir / "checkpoints" / str(step))["sha256"],
        "steps": step,
        "parameters": flops.parameter_count(model),
        "tokens": step * e.train.batch_size * e.data.context,
        "last": {k: v for r in records for k, v in r.items() if k.startswith(("train/", "eval/"))},
        "seconds_to_first_step": first,
        "seconds": records[-1]["seconds"],
        "peak": [peak, how],
    } | speeds


def evaluate(e: Experiment, workdir) -> dict:
    run = load_run(workdir)
    data = prepare.prepare(run.data)
    embedded = all(isinstance(s, EmbeddedPython | World) for s in e.data.sources)
    suite = "python" if embedded else "text"
    results = evals.run_suite(run, suite, tasks.heldout(run, data.valid), workdir / "eval" / suite)
    print(evals.table(results))
    print("compressing the training text with and without the held-out text", flush=True)
    bound = compressor.bound(data.train.values(), data.valid.values(), run.tokenizer, COMPRESSOR_BYTES)
    metrics = results["tasks"]["loss"]["metrics"]
    share = {n: p.bytes / bound["heldout_bytes"] for n, p in data.valid.items()}
    bits = sum(share[n] * metrics[f"{n}/bits_per_byte"]["value"] for n in share)
    error = sum((share[n] * metrics[f"{n}/bits_per_byte"]["stderr"]) ** 2 for n in share) ** 0.5
    print(f"bits per byte of held-out text: model {bits:.3f}, compressor {bound['bits_per_byte']:.3f}")
    return {"results": results, "bits_per_byte": [bits, error], "bound": bound}


def _prompts(run: Run, valid: dict[str, PackedSet]) -> list[str]:
    """Beginnings of held-out texts, the longest last, each without its torn last word where that leaves enough."""
    whole = [(text, text[: max(text.rfind(" "), 0)].rstrip()) for text in _beginnings(run.tokenizer, valid, 3, 48)]
    return sorted((cut if len(cut) >= 24 else text for text, cut in whole), key=len)


def sample(workdir, out) -> dict:
    run = load_run(workdir)
    prompts = _prompts(run, prepare.prepare(run.data).valid)
    encoded = [run.encode(p) for p in prompts]
    if run.encode(""):  # a start token: the model can begin by itself
        prompts, encoded = ["", *prompts], [run.encode(""), *encoded]
    if not encoded:
        raise UserError("the held-out text is too short to take a prompt from it")
    room = run.experiment.data.context - max(map(len, encoded))
    sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=max(8, min(96, room)))
    completions = generate(run.model, run.params, run.tokenizer, encoded, sampling)
    ids = encoded[-1]
    probabilities = next_token_distribution(run.model, run.params, ids)
    drawn = ids[: show.LONGEST_ATTENTION // 4]
    tokens_1T = jnp.asarray([drawn])
    seen = jax.jit(attention_weights, static_argnums=0)
    weights = seen(run.model, run.params, tokens_1T, jnp.arange(len(drawn))[None], jnp.ones_like(tokens_1T))
    storage.make_dir(out)
    try:
        show.attention_png(out / "attention.png", np.asarray(weights)[:, 0], run.tokenizer.pieces(drawn))
    except UserError as error:  # without matplotlib there is a page without pictures
        print(error, file=sys.stderr)
    for prompt, c in zip(prompts, completions):
        text = "".join(t if t.isprintable() or t == "\n" else "\ufffd" for t in c.text)  # a terminal obeys the others
        print(f"--- {prompt!r} ...\n{text}")
    return {
        "settings": {"temperature": 0.8, "top_p": 0.95, "seed": sampling.seed},
        "samples": [
            {"prompt": p, "text": c.text, "finish_reason": c.finish_reason} for p, c in zip(prompts, completions)
        ],
        "distribution": {
            "prompt": prompts[-1],
            "next": show.likeliest(run.tokenizer, probabilities, 10),
            "pieces": [show.visible(p) for p in run.tokenizer.pieces(ids)],
        },
    }
