"""The flags that every launcher of jobs has, and the job that they describe."""

import os
import sys

from absl import flags

from jaxlm.config import UserError
from launch import job as jobs
from launch.job import Gpus, Job, Processes, Step
from launch.tpus import Tpu

NAME = flags.DEFINE_string("name", None, "Name of the job: lower case letters, digits and dashes.")
ENV = flags.DEFINE_multi_string(
    "env", [], "NAME=VALUE for the job's environment, or NAME alone: a secret, taken from here and never shown."
)
MAX_PREEMPTIONS = flags.DEFINE_integer("max_preemptions", 100, "Starts again after so many preemptions.")
MAX_FAILURES = flags.DEFINE_integer(
    "max_failures", None, "Starts again after so many failures; default: 3, in launch.local 0."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print exactly what would be run, and run nothing.")


def job(
    words: list[str],
    on: Tpu | Gpus | Processes,
    processes: int,
    shared_disk: bool,
    max_failures: int = 3,
    default_name: str | None = None,
) -> Job:
    """The job that flags and the words behind `--` describe, as `job.validate` takes it; secrets must be set here.

    max_failures, default_name: unless flags say otherwise. Raises `UserError` for a job that cannot run.
    """
    env, secrets = jobs.variables(ENV.value, os.environ)
    failures = max_failures if MAX_FAILURES.value is None else MAX_FAILURES.value
    described = Job(name(default_name), jobs.command(words), on, env, secrets, MAX_PREEMPTIONS.value, failures)
    jobs.validate(described, processes, shared_disk)
    return described


def name(default: str | None = None) -> str:
    found = NAME.value or default
    if not found:
        raise UserError("--name is missing: --name=ppo1")
    jobs.check_name(found)
    return found


def ready(job: Job, steps: list[Step], tool: str, where: str) -> bool:
    """Whether `job` is to be started by its `steps`; by --dry_run they are printed instead, secrets as ***.

    Raises `UserError` without `tool`, which comes from `where`, and for a definition that does not resolve here.
    """
    if not DRY_RUN.value:
        jobs.need(tool, where)
    jobs.check_definition(job, sys.executable)
    if DRY_RUN.value:
        print("\n\n".join(jobs.show(step, job.secrets) for step in steps))
    return not DRY_RUN.value


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
