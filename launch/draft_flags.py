"""Flags of the programs that sample with a draft model beside the target."""

from absl import flags

DRAFT = flags.DEFINE_string(
    "draft", None, "Folder of a run of a smaller model with the same tokenizer, which proposes tokens."
)
DRAFT_TOKENS = flags.DEFINE_integer("draft_tokens", 4, "How many tokens the draft proposes at a time.", 1)
