"""Submits a job to Slurm: one process a GPU, saved before the time limit, and queued again until it is done.

usage:
  python -m launch.slurm --name=NAME --nodes=N --gpus_per_node=8 --time=24:00:00 [options] -- launch.train ARGUMENTS
  python -m launch.slurm --name=NAME --status | --logs | --delete

Some minutes before the limit (--save_seconds), or when Slurm preempts it, every process is told to save and ends with
42; the batch script then puts the job back into the queue, and it resumes from its --workdir. It runs from this folder,
with the code as it stands when it starts or starts again: submit from a folder of its own (git worktree add) if you go
on editing. Output is in runs/slurm/.

--sbatch=partition=gpu and the like become lines of #SBATCH. --env=NAME is handed over by sbatch itself, by name: the
script does not hold its value.

examples:
  python -m launch.slurm --name=ppo1 --nodes=32 --gpus_per_node=8 --time=24:00:00 --sbatch=partition=gpu \\
      --env=HF_TOKEN -- launch.train --experiment=ppo_tiny --set=mesh.fsdp=none \\
      --set=parent=runs/sft --workdir=runs/ppo1
  python -m launch.slurm --name=ppo1 --logs

Exit codes: 0 submitted (or shown); 2 bad definition or input. The job's own: 0 done; 2 bad definition or input;
3 diverged; these never run again.
"""

import dataclasses
import re
import shlex

from absl import flags

from jaxlm.config import UserError
from jaxlm.run import exits
from launch import cluster_flags, common, job_flags
from launch import job as jobs
from launch.job import Gpus, Job, Step

NODES = flags.DEFINE_integer("nodes", None, "So many nodes.")
GPUS_PER_NODE = flags.DEFINE_integer("gpus_per_node", None, "GPUs of a node, and processes on it.")
TIME = flags.DEFINE_string("time", None, "Limit of one start, as Slurm writes it; the job goes on after it.")
SAVE_SECONDS = flags.DEFINE_integer("save_seconds", 600, "So long before the limit it is told to save.", lower_bound=1)
PYTHON = flags.DEFINE_string("python", ".venv/bin/python", "Interpreter, seen from this folder on every node.")
SBATCH = flags.DEFINE_multi_string("sbatch", [], "NAME=VALUE: a further option of sbatch, without its dashes.")

FOLDER = "runs/slurm"
LIMIT = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@dataclasses.dataclass(frozen=True)
class Place:
    """How nodes are asked for. save_seconds: before the limit. options: as --sbatch gives them."""

    time: str | None = None
    save_seconds: int = 600
    python: str = ".venv/bin/python"
    options: tuple[str, ...] = ()


# Every task notes how it ended if it is the first to end badly: the others are ended by srun, and tell of that alone.
TASK = f"""
  trap : TERM  # the program saves; this shell has to wait for it
  code=0
  "$@" || code=$?
  if [ "$code" != {exits.EXIT_DONE} ]; then (set -o noclobber; echo "$code" >"$0") 2>/dev/null; fi
  exit "$code"
"""


def script(job: Job, place: Place) -> str:
    """The batch script of a job on `Gpus`, whose secrets Slurm takes from the environment of sbatch."""
    options = {
        "job-name": job.name,
        "nodes": job.on.nodes,
        "ntasks-per-node": job.on.per_node,
        "gpus-per-node": job.on.per_node,  # not per task: jax picks by the local number among all that it sees
        "time": place.time,
        "signal": f"TERM@{place.save_seconds}",  # to the tasks, not to this script
        "open-mode": "append",
        "output": f"{FOLDER}/{job.name}-%j.log",
        "export": ",".join(("ALL", *job.secrets)) if job.secrets else "NONE",  # names alone would leave out PATH
    }
    asked = [f"--{k}={v}" for k, v in options.items() if v is not None]
    asked += ["--requeue", *(f"--{o}" for o in place.options)]
    never = " | ".join(str(code) for code in (exits.EXIT_DONE, *jobs.NEVER_AGAIN))
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {a}" for a in asked),
            "set -u",
            *(f"export {name}={shlex.quote(value)}" for name, value in job.env),
            f'state="{FOLDER}/{job.name}-$SLURM_JOB_ID"',
            'rm -f "$state.first"',
            "",
            "# Only when Slurm ends the whole job, by scancel or by a preemption that it sees to itself.",
            "told=",
            "trap 'told=yes' TERM",
            "# shellcheck disable=SC2016",
            f"srun --kill-on-bad-exit=1 --export=ALL bash -c {shlex.quote(TASK)} \\",
            f'  "$state.first" {shlex.join([place.python, "-m", *job.command])}',
            "code=$?",
            'if [ -s "$state.first" ]; then code="$(cat "$state.first")"; fi',
            'echo "$(date -u +%FT%TZ) the job ended with exit code $code"',
            'if [ -n "$told" ]; then exit "$code"; fi',
            "",
            "# Preemptions and failures are counted apart; Slurm counts every start after the first.",
            'case "$code" in',
            f'  {never}) exit "$code" ;;',
            f"  {exits.EXIT_PREEMPTED}) ;;",
            '  *) echo "$code" >>"$state.failures" ;;',
            "esac",
            'failures="$(cat "$state.failures" 2>/dev/null | wc -l)"',
            "preemptions=$((${SLURM_RESTART_COUNT:-0} + 1 - failures))",
            f'if [ "$failures" -gt {job.max_failures} ] || [ "$preemptions" -gt {job.max_preemptions} ]; then',
            '  echo "failed $failures times, preempted $preemptions times: it does not start again"',
            '  exit "$code"',
            "fi",
            'scontrol requeue "$SLURM_JOB_ID"',
            'exit "$code"',
            "",
        ]
    )


def steps(job: Job, place: Place) -> list[Step]:
    return [
        Step(("mkdir", "-p", FOLDER)),
        Step(("sbatch", "--parsable"), "the job; secrets by name", lambda _: script(job, place)),
    ]


def look(asked: str, name: str) -> Step:
    """What `asked`, one of status, logs and delete, runs."""
    if asked == "delete":
        return Step(("scancel", "--me", f"--name={name}"))
    if asked == "logs":
        newest = f'tail -n 50 "$(ls -t {FOLDER}/{name}-*.log | head -n 1)"'
        return Step(("bash", "-c", newest))
    return Step(("squeue", "--me", f"--name={name}", "--format=%i %j %T, %D nodes, %M of %l, %r"))


def seconds(limit: str) -> int:
    """Of a time as Slurm writes it: minutes, MM:SS, HH:MM:SS, or DAYS- and hours, HH:MM or HH:MM:SS."""
    days, behind_days, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (60, 1) if not behind_days and len(parts) < 3 else (3600, 60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units))


def check_place(place: Place) -> None:
    jobs.check_words("--sbatch", place.options)
    if place.time is not None and not LIMIT.fullmatch(place.time):
        raise UserError(f"--time={place.time!r}: minutes, or HH:MM:SS, or DAYS-HH:MM:SS")
    if place.time is not None and 0 < seconds(place.time) <= place.save_seconds:  # 0 is no limit
        raise UserError(
            f"--time={place.time}: every start would be told to save at once, --save_seconds={place.save_seconds} "
            "before its limit; give more time, or fewer --save_seconds"
        )
    for option in place.options:
        if option.startswith("-"):
            raise UserError(f"--sbatch={option}: without its dashes, such as --sbatch=partition=gpu")


def main(words: list[str]) -> int:
    where = "it is there on a cluster's login node"
    if cluster_flags.WORKER.present:
        raise UserError("--worker: under Slurm all processes write into one log, which --logs shows; leave it out")
    if (asked := cluster_flags.asked()) is not None:
        step = look(asked, job_flags.name())
        jobs.need(step.argv[0], where)
        return jobs.run(step, Job(job_flags.name(), (), Gpus(1, 1))).returncode
    for flag in (NODES, GPUS_PER_NODE):
        if flag.value is None or flag.value < 1:
            raise UserError(f"--{flag.name}=N is needed, 1 or more; got {flag.value}")
    on = Gpus(NODES.value, GPUS_PER_NODE.value)
    job = job_flags.job(words, on, on.processes, shared_disk=True)
    place = Place(TIME.value, SAVE_SECONDS.value, PYTHON.value, tuple(SBATCH.value))
    check_place(place)
    if not job_flags.ready(job, steps(job, place), "sbatch", where):
        return 0
    *first, submit = steps(job, place)
    for step in first:
        jobs.run(step, job)
    done = jobs.run(submit, job, capture=True)
    if done.returncode:
        raise UserError(f"sbatch refused the job: {jobs.last_line(done)}")
    number = done.stdout.strip().split(";")[0]
    print(f"submitted as job {number}; its output: {FOLDER}/{job.name}-{number}.log; --status, --logs, --delete")
    return 0


if __name__ == "__main__":
    common.run(main, takes_command=True)
