"""A training run from its definition: data, state and step for the loop, and the run directory around it."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp

from jaxlm import config, sharding, storage
from jaxlm.config import UserError
from jaxlm.data.loader import Loader, evaluation_batches
from jaxlm.data.prepare import Prepared, cache_root
from jaxlm.data.tokenizer import Saved
from jaxlm.nn import heads, lora, transformer
from jaxlm.run import exits, goodput, lineage, load, loop, objectives, report
from jaxlm.run.checkpoint import Checkpoints, steps_saved
from jaxlm.run.experiment import Experiment, prepared, validate
from jaxlm.run.goodput import Clock
from jaxlm.run.log import MetricsLog, Progress, peak_flops
from jaxlm.run.watchdog import Watchdog
from jaxlm.steps import pretrain, state, update
from jaxlm.steps.distill import Distill


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
        if isinstance(e.objective, Distill) and e.data.tokenizer is None:
            theirs = Saved(str(storage.path(e.objective.teacher) / "tokenizer"))
            e = dataclasses.replace(e, data=dataclasses.replace(e.data, tokenizer=theirs))
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


def settle(e: Experiment, workdir, batch_shards: int, data: Prepared | None = None) -> tuple[Experiment, Prepared]:
    """(the definition as it runs, its data); `UserError` where it cannot run, or `workdir` holds another experiment.

    batch_shards: over how many devices the rows of a batch are spread. data: of a definition with the same data.
    """
    validate(e, batch_shards)
    objectives.validate(e)
    lineage.check_same_experiment(workdir, e)
    data = prepared(e.data) if data is None else data
    objectives.check_tokenizers(e, data.tokenizer)
    e = bind(e, data.tokenizer.vocab_size)
    transformer.validate(e.model)
    lora.validate(e.model, e.lora)
    lineage.check_same_experiment(workdir, e)
    return e, data


def parents_params(e: Experiment, mesh, records: dict):
    """The parameters of the parent's checkpoint in `records` (lineage.json's); None without a parent."""
    return None if e.parent is None else objectives.read_origin(e, "parent", mesh, records)[1]


def started(fresh: state.TrainState, theirs) -> state.TrainState:
    """A fresh state with a parent's parameters in it, if there is one; heads that the parent lacks stay fresh."""
    if theirs is None:
        return fresh
    kept = {name: theirs["heads"].get(name, head) for name, head in fresh.params["heads"].items()}
    params = {"backbone": theirs["backbone"], "heads": kept, "adapters": fresh.params["adapters"]}
    return fresh.replace(params=jax.tree.map(lambda new, x: new.astype(x.dtype), params, fresh.params))


def initial_state(e: Experiment, mesh, records: dict):
    """A sharded state: parameters from the seed, or from the parent's checkpoint in `records`."""
    fresh = state.create_sharded(e.model, e.optimizer, e.seed, mesh, e.lora, e.heads)
    return started(fresh, parents_params(e, mesh, records))


def _floats(node) -> dict:
    """The float settings of a node by path, as arrays: they enter a compiled function as its arguments."""
    return {k: jnp.asarray(v, jnp.float32) for k, v in update.hyperparameters(node).items()}


def _reference_of(reference, params, frozen):
    """(model, parameters) as objectives take them, inside a compiled function; see `objectives.read_reference`."""
    if reference is None:
        return None
    return reference[0], params | {"adapters": {}} if frozen is None else frozen


def step_of(e: Experiment, reference=None):
    """(state, batch, frozen, hyper, floats, total_steps, seed) -> (state, metrics) of an experiment, not yet compiled.

    hyper, floats: the float settings of optimizer and objective as arrays. reference: as `objectives.read_reference`
    gives it; its parameters come in as `frozen`.
    """
    task = objectives.task(e)

    def one(s, batch, frozen, hyper, floats, total_steps, seed):
        objective = config.replace_leaves(e.objective, floats)

        def adapted(params, batch, key):
            loss = task.loss(objective, e.model, e.train, _reference_of(reference, params, frozen))
            return loss(lora.attach(e.lora, params), batch, key)

        axes, precision = heads.specs(e.model, e.lora, e.heads), e.model.precision
        return update.update(adapted, e.optimizer, axes, precision, e.train, seed, s, batch, hyper, total_steps)

    return one


def step_function(e: Experiment, mesh, reference=None) -> sharding.Program:
    """The jitted, donated (state, batch) -> (state, metrics) of an experiment, on a mesh.

    Float settings of optimizer and objective enter as arrays: runs that differ in them alone share one compiled
    program. reference: as `objectives.read_reference` gives it; its parameters are never donated.
    """
    hyper, floats = _floats(e.optimizer), _floats(e.objective)
    shardings = jax.tree.map(lambda a: a.sharding, state.abstract(e.model, e.optimizer, mesh, e.lora, e.heads))
    jitted = jax.jit(
        step_of(e, reference),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=sharding.compiler_options(mesh),
    )
    frozen = None if reference is None else reference[1]
    return sharding.Program(jitted, mesh, (frozen, hyper, floats, e.train.steps, e.seed))


def sums_of(e: Experiment, reference=None):
    """(params, batch, frozen, floats, token_bytes) -> the objective's sums over a batch, as `step_of`."""
    task = objectives.task(e)

    def sums(params, batch, frozen, floats, token_bytes):
        objective, theirs = config.replace_leaves(e.objective, floats), _reference_of(reference, params, frozen)
        params = lora.attach(e.lora, params)
        return task.sums(objective, e.model, e.train.loss_chunk, theirs, params, batch, token_bytes)

    return sums


def evaluated(e: Experiment, mesh, valid: dict, sums, summarize) -> dict:
    """{source: `summarize` of its sums}, with `all` over every source together. sums: of a batch; mesh: for it."""
    results, total = {}, None
    for name, packed in valid.items():
        found = None
        for batch in evaluation_batches(packed, e.evaluation.batch_size, mesh, e.evaluation.max_batches):
            found = pretrain.add(found, sums(batch))
        results[name] = summarize(found)
        total = pretrain.add(total, found)
    return results | {"all": summarize(total)}


def evaluate_function(e: Experiment, mesh, tokenizer, valid: dict, reference=None):
    """(params) -> {source: {"loss", ...}} as the objective measures it, with `all` over every source together."""
    summarize, frozen = objectives.task(e).summarize, None if reference is None else reference[1]
    rest = (frozen, _floats(e.objective), jnp.asarray(tokenizer.token_bytes))
    sums = sharding.Program(jax.jit(sums_of(e, reference)), mesh, rest)

    def call(params):
        with jax.set_mesh(mesh):
            return evaluated(e, mesh, valid, functools.partial(sums, params), summarize)

    return call


def metrics_of(results: dict) -> dict[str, float]:
    """What an evaluation adds to the log."""
    return {f"eval/{name}/{k}": v for name, result in results.items() for k, v in result.items()}


def rates(e: Experiment, reference, devices: int) -> tuple[dict[str, float], str]:
    """(what an update counts towards each metric per second, how the devices' peak is known)."""
    tokens = e.train.batch_size * e.data.context
    peak, source = peak_flops(e.model.precision.compute)
    per_second = {
        "train/steps_per_second": 1.0,
        "train/tokens_per_second": tokens,
        "train/model_flops_utilization": objectives.flops_per_token(e, reference) * tokens / (peak * devices),
    }
    return per_second, f"peak {peak / 1e12:.3g} TFLOP/s a device, {source}"


def open_workdir(workdir, tokenizer):
    """The path of the run directory, made where it was not there. `UserError` when the run was saved with another
    tokenizer."""
    root = storage.make_dir(workdir)
    if steps_saved(root):
        lineage.check_same_tokenizer(root, tokenizer.hash)
    return root


def write_definition(root, e: Experiment, base: Experiment | None, tokenizer) -> None:
    """Writes on process 0 what is known before the first step, over that of the start before: so not until nothing can
    refuse to go on from what was saved, or to begin from what others saved."""
    lineage.write_allowed()
    if jax.process_index() == 0:
        storage.write_text(root / "config.json", config.to_json(e))
        storage.write_text(root / "diff.txt", "".join(f"{line}\n" for line in config.diff(base or e, e)))
        lineage.write_environment(root)
        tokenizer.save(root / "tokenizer")


def train(e: Experiment, workdir, base: Experiment | None = None) -> int:
    """Runs or resumes the experiment in `workdir`; returns the exit code. `base` is what `diff.txt` compares with."""
    clock = Clock()
    use_compilation_cache()
    objectives.check_there(e)
    e = inherit(e)
    mesh = sharding.make_mesh(e.mesh)
    e, data = settle(e, workdir, mesh.shape["replica"] * mesh.shape["fsdp"])

    root = open_workdir(workdir, data.tokenizer)
    # The data may take as long as it is large; from here on nothing takes long without a phase that ends.
    with Watchdog(clock, e.train.hang_seconds, root), loop.memory_advice():
        checkpoints = Checkpoints(root, e.checkpoint)
        found = checkpoints.latest()
        if found is None:
            records = objectives.origin_records(e)
            s = initial_state(e, mesh, records)
            lineage.write_lineage(root, data.hashes, **records)
        else:
            with clock.phase("restore"):
                s, metadata = checkpoints.restore(state.abstract(e.model, e.optimizer, mesh, e.lora, e.heads), found)
            lineage.check_same_draws(metadata)
            lineage.check_same_data(metadata["hashes"], data.hashes)
            records = storage.read_json(root / "lineage.json")
        reference = objectives.read_reference(e, mesh, records)
        write_definition(root, e, base, data.tokenizer)

        per_second, peak = rates(e, reference, mesh.size)
        log = MetricsLog(root, e.train.tensorboard)
        progress = Progress(e.train.steps, int(s.step), peak)
        score = evaluate_function(e, mesh, data.tokenizer, data.valid, reference)

        def evaluate(n, s):
            values = metrics_of(score(s.params))
            log.write(n, values)
            progress.note(n, {k: v for k, v in values.items() if k.count("/") == 2})  # without diagrams
            return values["eval/all/loss"]

        recorder = loop.Recorder(
            first=int(s.step),
            rates=per_second,
            max_skipped=e.train.max_skipped,
            sinks=[log.write, progress.update],
            clock=clock,
            skipped=int(s.skipped),
        )
        try:
            with Loader(data.train, e.train.batch_size, e.seed, mesh, first=int(s.step)) as loader:
                s, code = loop.run(
                    s,
                    step_function(e, mesh, reference),
                    loader.batch,
                    e.train.steps,
                    recorder=recorder,
                    log_every=e.train.log_every,
                    evaluate=evaluate,
                    evaluate_every=e.evaluation.every,
                    checkpoints=checkpoints,
                    metadata=lineage.metadata(data.hashes),
                )
        finally:
            progress.close()
            log.close()
            checkpoints.close()
    goodput.tell(root, progress.say)
    if code == exits.EXIT_DONE and (finish := objectives.task(e).finish) is not None:
        finish(e, mesh, s.params, data.valid, root, int(s.step))
    report.loss_curve(root, objectives.task(e).unit)
    return code
