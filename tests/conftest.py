"""Guard rails for every test: CPU, 8 forced host devices, no silent rank promotion, nothing written to the home.

Most of a test's time is the compiler's: its expensive passes are off (JAXLM_TEST_OPTIMIZED=1 turns them on), and
compiled programs are kept beside pytest's own cache, for the other worker and for the next run.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jaxlm"
os.environ["JAXLM_CACHE"] = str(CACHE)

import jax  # noqa: E402  after the environment is set
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", os.environ.get("JAXLM_TEST_OPTIMIZED") != "1")
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

MAPS = Path("/proc/self/maps")  # a line for each mapping of this process, of which Linux allows 65,530
ENOUGH = 20_000


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """A compiled program of a CPU holds several mappings; a worker that keeps those of every file ends in a crash."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > ENOUGH:
        jax.clear_caches()
