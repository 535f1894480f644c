"""The flag of the programs that let one choose how keys and values are kept while decoding."""

from absl import flags

CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype",
    None,
    ["float32", "bfloat16", "int8"],  # `nn.definition.CACHE_DTYPES`, which importing would bring in JAX
    "Of keys and values kept while decoding, the draft's too; int8 has a scale for each token and head. Unset, as the "
    "model's definition says (model.precision.cache), which mostly is the dtype of computation.",
)
