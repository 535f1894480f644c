"""The programs. `python -m launch.NAME` comes through here before it imports anything else.

XLA on a CPU asks for its temporary buffers at every step and gives them back, and glibc, left to itself, maps and
zeroes fresh pages each time. A process reads these settings when it starts, so the program is started again with them:
in milliseconds, since nothing has been imported yet. docs/results/speed.md has what it is worth.
"""

import glob
import os
import sys

ALLOCATOR = ":".join(
    [
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_max=0",
        "glibc.malloc.trim_threshold=100000000000",
        "glibc.malloc.top_pad=67108864",
        "glibc.malloc.arena_max=1",  # those of other threads map what is larger than they are, whatever stands above
    ]
)
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def keep_pages() -> None:
    """For our programs on Linux where the CPU trains; a GLIBC_TUNABLES of the user's own, even an empty one, stands."""
    ours = sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith("launch.")
    if not ours or sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    if not any(glob.glob(pattern) for pattern in ACCELERATORS):
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


keep_pages()
