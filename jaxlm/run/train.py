"""A training run from its definition: data, state and step for the loop, and the run directory around it."""

import dataclasses
import os

import jax
import jax.numpy as jnp

from jaxlm import config, sharding, storage
from jaxlm.config import UserError
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.loader import Loader, evaluation_batches
from jaxlm.data.prepare import cache_root
from jaxlm.data.tokenizer import Saved
from jaxlm.nn import lora, transformer
from jaxlm.run import checkpoint, lineage, load, loop, report
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.experiment import Experiment, prepared, validate
from jaxlm.run.log import MetricsLog, Progress, peak_flops
from jaxlm.steps import pretrain, state, update


def use_compilation_cache(folder=None) -> None:
    """Keeps compiled programs on disk, in $JAXLM_CACHE/xla or ~/.cache/jaxlm/xla, so that a second run starts fast."""
    folder = folder or os.path.join(cache_root(None), "xla")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def bind(e: Experiment, vocab_size: int) -> Experiment:
    """The definition with the model's vocabulary taken from the tokenizer; `UserError` when it was set otherwise."""
    if e.model.vocab_size not in (None, vocab_size):
        raise UserError(f"model.vocab_size is {e.model.vocab_size}, the tokenizer has {vocab_size}; leave it unset")
    return dataclasses.replace(e, model=dataclasses.replace(e.model, vocab_size=vocab_size))


# How a model runs, not what it is: a run may choose these whatever its parent had.
EXECUTION = ("dropout", "attention", "scan", "remat", "precision.")


def inherit(e: Experiment) -> Experiment:
    """The definition with what it leaves to its parent; `UserError` when there is none, or the two do not fit."""
    if e.parent is None:
        if e.model is None or e.data.tokenizer is None:
            raise UserError("model and data.tokenizer can be unset only with a parent: --set=parent=WORKDIR")
        return e
    parent = load.load_experiment(e.parent)
    model = parent.model if e.model is None else e.model
    vocabulary = dataclasses.replace(model, vocab_size=parent.model.vocab_size)
    if lines := [d for d in config.diff(parent.model, vocabulary) if not d.startswith(EXECUTION)]:
        raise UserError(f"model differs from that of parent {e.parent}: {'; '.join(lines)}; --set=model=none takes it")
    tokenizer = Saved(str(storage.path(e.parent) / "tokenizer")) if e.data.tokenizer is None else e.data.tokenizer
    return dataclasses.replace(e, model=model, data=dataclasses.replace(e.data, tokenizer=tokenizer))


def initial_state(e: Experiment, mesh, tokenizer):
    """(fresh sharded state, what lineage.json says of its parent): parameters from the seed or from the parent."""
    fresh = state.create_sharded(e.model, e.optimizer, e.seed, mesh, e.lora)
    if e.parent is None:
        return fresh, {}
    theirs = tokenizers.load(storage.path(e.parent) / "tokenizer")
    if theirs.hash != tokenizer.hash:
        raise UserError(f"data.tokenizer is not that of parent {e.parent}; --set=data.tokenizer=none takes it")
    metadata = checkpoint.read_metadata(e.parent)
    parent = load.load_experiment(e.parent)
    params = load.read_params(e.parent, parent.model, parent.lora, metadata["step"], mesh)
    params = params | {"adapters": fresh.params["adapters"]}
    params = jax.tree.map(lambda new, x: new.astype(x.dtype), params, fresh.params)
    return fresh.replace(params=params), {"parent": {"step": metadata["step"], "hashes": metadata.get("hashes", {})}}


def step_function(e: Experiment, mesh):
    """The jitted, donated (state, batch) -> (state, metrics) of an experiment, on a mesh.

    Float settings of the optimizer enter as arrays: runs that differ in them alone share one compiled program.
    """
    hyper = {k: jnp.asarray(v, jnp.float32) for k, v in update.hyperparameters(e.optimizer).items()}
    shardings = jax.tree.map(lambda a: a.sharding, state.abstract(e.model, e.optimizer, mesh, e.lora))
    whole = sharding.replicated(mesh)

    def one(s, batch, hyper, total_steps, seed):
        loss = pretrain.make_loss(e.model, e.train)

        def adapted(params, batch, key):
            return loss(lora.attach(e.lora, params), batch, key)

        axes, precision = lora.specs(e.model, e.lora), e.model.precision
        return update.update(adapted, e.optimizer, axes, precision, e.train, seed, s, batch, hyper, total_steps)

    jitted = jax.jit(one, donate_argnums=0, out_shardings=(shardings, whole))

    def call(s, batch):
        with jax.set_mesh(mesh):
            return jitted(s, batch, hyper, e.train.steps, e.seed)

    return call


def evaluate_function(e: Experiment, mesh, tokenizer, valid: dict):
    """(params) -> {source: {"loss", "bits_per_byte"}}, with `all` over every source together."""

    @jax.jit
    def sums_of(params, batch, token_bytes):
        params = lora.attach(e.lora, params)
        return pretrain.evaluation_sums(e.model, e.train.loss_chunk, params, batch, token_bytes)

    token_bytes = jnp.asarray(tokenizer.token_bytes)

    def call(params):
        results, total = {}, None
        with jax.set_mesh(mesh):
            for name, packed in valid.items():
                sums = None
                for batch in evaluation_batches(packed, e.evaluation.batch_size, mesh, e.evaluation.max_batches):
                    sums = pretrain.add(sums, sums_of(params, batch, token_bytes))
                results[name] = pretrain.summarize(sums)
                total = pretrain.add(total, sums)
        return results | {"all": pretrain.summarize(total)}

    return call


def train(e: Experiment, workdir, base: Experiment | None = None) -> int:
    """Runs or resumes the experiment in `workdir`; returns the exit code. `base` is what `diff.txt` compares with."""
    use_compilation_cache()
    e = inherit(e)
    mesh = sharding.make_mesh(e.mesh)
    validate(e, mesh.shape["replica"] * mesh.shape["fsdp"])
    lineage.check_same_experiment(workdir, e)
    data = prepared(e.data)
    tokenizer, e = data.tokenizer, bind(e, data.tokenizer.vocab_size)
    transformer.validate(e.model)
    lora.validate(e.model, e.lora)
    lineage.check_same_experiment(workdir, e)

    root = storage.make_dir(workdir)
    storage.write_text(root / "config.json", config.to_json(e))
    storage.write_text(root / "diff.txt", "".join(f"{line}\n" for line in config.diff(base or e, e)))
    lineage.write_environment(root)
    tokenizer.save(root / "tokenizer")

    checkpoints = Checkpoints(root, e.checkpoint)
    found = checkpoints.latest()
    if found is None:
        s, parent = initial_state(e, mesh, tokenizer)
        lineage.write_lineage(root, data.hashes, **parent)
    else:
        s, metadata = checkpoints.restore(state.abstract(e.model, e.optimizer, mesh, e.lora), found)
        lineage.check_same_data(metadata["hashes"], data.hashes)

    tokens = e.train.batch_size * e.data.context
    peak, peak_source = peak_flops(e.model.precision.compute)
    model_flops = lora.flops_per_token(e.model, e.lora, e.data.context)["train"] * tokens
    log = MetricsLog(root, e.train.tensorboard)
    progress = Progress(e.train.steps, int(s.step), f"peak {peak / 1e12:.3g} TFLOP/s a device, {peak_source}")
    score = evaluate_function(e, mesh, tokenizer, data.valid)

    def evaluate(n, s):
        values = {f"eval/{name}/{k}": v for name, result in score(s.params).items() for k, v in result.items()}
        log.write(n, values)
        progress.note(n, values)
        return values["eval/all/loss"]

    recorder = loop.Recorder(
        first=int(s.step),
        rates={
            "train/steps_per_second": 1.0,
            "train/tokens_per_second": tokens,
            "train/model_flops_utilization": model_flops / (peak * mesh.size),
        },
        max_skipped=e.train.max_skipped,
        sinks=[log.write, progress.update],
        skipped=int(s.skipped),
    )
    try:
        with Loader(data.train, e.train.batch_size, e.seed, mesh, first=int(s.step)) as loader:
            _, code = loop.run(
                s,
                step_function(e, mesh),
                loader.batch,
                e.train.steps,
                recorder=recorder,
                log_every=e.train.log_every,
                evaluate=evaluate,
                evaluate_every=e.evaluation.every,
                checkpoints=checkpoints,
                metadata={"hashes": data.hashes},
            )
    finally:
        progress.close()
        log.close()
        checkpoints.close()
    report.loss_curve(root)
    return code
