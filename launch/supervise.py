"""Starts a job again after preemptions and after failures, each up to a limit of its own."""

import time
from collections.abc import Callable

from jaxlm.run import exits
from launch.job import NEVER_AGAIN, Job


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def supervise(job: Job, attempt: Callable[[], int], pause: float) -> int:
    """Calls `attempt`, which runs the job and gives its exit code, until it must not start again; gives the last code.

    pause: seconds before it starts again after a failure, which may be one of the system's that passes.
    """
    preemptions = failures = 0
    while True:
        code = attempt()
        if code == exits.EXIT_DONE or code in NEVER_AGAIN:
            return code
        if code == exits.EXIT_PREEMPTED:
            preemptions += 1
            if preemptions > job.max_preemptions:
                say(f"preempted {preemptions} times, --max_preemptions={job.max_preemptions}: it does not start again")
                return code
            say(f"preempted, {preemptions} of at most {job.max_preemptions} times; it starts again")
        else:
            failures += 1
            if failures > job.max_failures:
                say(f"failed {failures} times, --max_failures={job.max_failures}: it does not start again")
                return code
            say(f"failed with exit code {code}, {failures} of at most {job.max_failures} times; it starts again")
            time.sleep(pause)
