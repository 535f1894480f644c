"""The other side of `launch.bench_rl`: TRL's GRPOTrainer and DPOTrainer on the same weights, called as users call them.

A process of its own, started with a job: `python -m launch.bench_trl JOB.json`. torch, transformers and TRL are
imported here alone.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np

from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.data.parallel import cores
from jaxlm.data.tasks import walks
from jaxlm.data.tokenizer import Tokenizer, load
from launch.bench_rows import peak_here

# What TRL's defaults would do otherwise: bfloat16, and activations computed twice. Nothing is reported or kept.
PLAIN = {
    "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
SHOWN = ("optim", "bf16", "gradient_checkpointing", "logging_steps")


def fast_tokenizer(ours: Tokenizer):
    """The character tokenizer as one of transformers': the start token in front, an id for each character."""
    import tokenizers
    import transformers

    names = {i: name for name, i in ours.control.items()}
    vocabulary = {names.get(i, b.decode()): i for i, b in enumerate(ours.id_bytes)}
    begin, end, pad, unknown = (names[i] for i in (ours.bos, ours.eos, ours.pad, ours.control["<|unk|>"]))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unknown))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, ours.bos)]
    )
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(list(names.values()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=begin, eos_token=end, pad_token=pad, unk_token=unknown
    )


def _model(folder: str):
    import torch
    import transformers

    torch.set_num_threads(cores())
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(job: Mapping) -> dict:
    """Logits of the job's tokens [B, T], and which TRL this is."""
    import torch
    import trl

    with torch.inference_mode():
        found = _model(job["model"])(torch.tensor(job["tokens"])).logits
    return {"logits": found.tolist(), "ppo": hasattr(trl, "PPOTrainer"), "version": trl.__version__}


def _reward(job: Mapping) -> Callable:
    """The task's own verdict, or a coin."""
    task, coin = config.from_dict(walks.Walks, job["task"]), np.random.default_rng(job["arguments"]["seed"])

    def optimality(prompts, completions, **_) -> list[float]:
        return [walks.optimality(task, prompt + text) for prompt, text in zip(prompts, completions)]

    def chance(prompts, **_) -> list[float]:
        return coin.integers(0, 2, len(prompts)).astype(float).tolist()

    return chance if job["random_reward"] else optimality


def train(job: Mapping) -> dict:
    """Trains as the job says; the figures of `bench_rl.train_ours`, and the settings that were in effect."""
    import datasets
    import torch
    import transformers
    import trl
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    ends, sampling = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append((time.perf_counter(), time.process_time()))

    ours = load(pathlib.Path(job["model"]) / "tokenizer")
    given = job["arguments"] | PLAIN | {"output_dir": job["out"], "use_cpu": job["cpu"]}
    began, cpu = time.perf_counter(), time.process_time()
    model, tokenizer = _model(job["model"]), fast_tokenizer(ours)
    text = job["records"][0]["prompt"]
    if tokenizer(text)["input_ids"] != [ours.bos, *ours.encode(text)]:
        raise UserError("transformers' tokenizer gives other ids than ours: this transformers builds it otherwise")
    shared = {
        "model": model, "processing_class": tokenizer, "callbacks": [Clock()],
        "train_dataset": datasets.Dataset.from_list(job["records"]),
    }  # fmt: skip
    if job["kind"] == "dpo":
        trainer = DPOTrainer(args=DPOConfig(**given, max_length=None), **shared)
    else:
        # In the order of the records: they are our side's prompts, rollout by rollout.
        arguments = GRPOConfig(**given, shuffle_dataset=False)
        trainer = GRPOTrainer(args=arguments, reward_funcs=_reward(job), **shared)
        generate = model.generate

        def timed(*args, **kwargs):
            at = time.perf_counter()
            try:
                return generate(*args, **kwargs)
            finally:
                sampling.append(time.perf_counter() - at)

        model.generate = timed
    trainer.train()
    model.__dict__.pop("generate", None)
    model.save_pretrained(job["out"])
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    seen = {name: getattr(trainer.args, name) for name in (*job["arguments"], *SHOWN)}
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "compile_seconds": 0.0,
        "updates": np.diff(ends, axis=0)[:, 0].tolist(),
        "cpu_updates": np.diff(ends, axis=0)[:, 1].tolist(),
        "sampling": sampling[1:],
        "peak_bytes": torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 1e6 * peak_here(),
        "settings": {k: getattr(v, "value", v) for k, v in seen.items()},
        "version": trl.__version__,
    }


def child(work: Callable[[dict], dict]) -> None:
    """The other end of `bench_rl.in_process`: sys.argv[1] is the job, and what `work` gives goes beside it."""
    file = pathlib.Path(sys.argv[1])
    done = work(storage.read_json(file))
    storage.write_json(file.with_suffix(".done.json"), done)


if __name__ == "__main__":
    child(lambda job: logits(job) if job["kind"] == "logits" else train(job))
