"""Exports a run with its adapters merged: as a plain workdir, or as a Hugging Face folder.

usage:
  python -m launch.export --workdir=RUN --out=DIR [--format=jaxlm|hf] [--step=N]

jaxlm: a workdir with one checkpoint, 0, which launch.sample, launch.eval and --set=parent=DIR take like any other.
config.json is the run's without adapters and parent; lineage.json says what it was made from.

hf: config.json and model.safetensors, in the spelling of the first of GPT-2, Llama, Mistral, Qwen 2, Qwen 3, Gemma 2,
Gemma 3 that computes the same function; a model that none of them does is an error that names the fields. Weights keep
the dtype of the run's parameters. The tokenizer is not converted: jaxlm's own stands in DIR/tokenizer, and one that was
imported from Hugging Face also stands beside config.json in its own form. Neither torch nor transformers is needed.

A run that launch.train has fine-tuned with --edit=lora needs no export to be sampled, evaluated or trained on: whatever
reads it merges the adapters. Export is for handing it on.

examples:
  python -m launch.export --workdir=runs/sft_lora --out=models/assistant
  python -m launch.export --workdir=runs/sft_lora --out=models/assistant_hf --format=hf

DIR must be new or empty and is written whole or not at all. Exit codes: 0 done; 2 bad input.
"""

from absl import flags

from jaxlm.config import UserError
from jaxlm.interop import export
from launch import common

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
OUT = flags.DEFINE_string("out", None, "New folder that is to hold the exported model.")
FORMAT = flags.DEFINE_enum("format", "jaxlm", ("jaxlm", "hf"), "A plain workdir, or a Hugging Face folder.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; by default the newest.", lower_bound=0)


def main() -> int:
    for flag, what in ((WORKDIR, "the folder of the run"), (OUT, "the folder that is to hold the exported model")):
        if flag.value is None:
            raise UserError(f"--{flag.name}=DIR is missing: {what}")
    write = export.export_hf if FORMAT.value == "hf" else export.export_jaxlm
    done = write(WORKDIR.value, OUT.value, STEP.value)
    form = "a workdir" if done.family is None else f"a Hugging Face folder, family {done.family}"
    print(f"{WORKDIR.value}, step {done.step}: {done.parameters:,} parameters written to {OUT.value} as {form}")
    return 0


if __name__ == "__main__":
    common.run(main)
