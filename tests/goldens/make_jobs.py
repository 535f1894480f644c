"""Writes the dry runs of jobs beside this file: what each system is given shows in review.

usage, from the project's root: python -m tests.goldens.make_jobs
"""

from pathlib import Path

from launch import gcloud, gke, job, local, slurm, tpu_vm, tpus
from launch.job import Gpus, Job, Processes

FOLDER = Path(__file__).parent / "jobs"


def ppo(on, workdir: str) -> Job:
    """PPO from a fine-tuned parent, on 32 hosts."""
    sets = ("--set=mesh.fsdp=none", f"--set=parent={workdir}/sft")
    arguments = ("--experiment=ppo_tiny", *sets, f"--workdir={workdir}/ppo1")
    return Job("ppo1", ("launch.train", *arguments), on, (("TAG", "first try"),), ("HF_TOKEN",))


def steps(described: Job, rendered: list[job.Step]) -> str:
    return "\n\n".join(job.show(step, described.secrets) for step in rendered)


def dry_runs() -> dict[str, str]:
    """File name -> what `--dry_run` prints."""
    tpu = ppo(tpus.find("v5p-256"), "gs://mine")
    place = gcloud.Place("my-project", "us-east5-a", "COMMIT", spot=True)
    slices = ppo(tpus.find("v6e-64", slices=2), "gs://mine")
    gpus = ppo(Gpus(32, 8), "runs")
    two = Job(
        "local", ("launch.train", "--experiment=pretrain_tiny", "--workdir=runs/two"), Processes(2, cpu_devices=2)
    )
    nodes = slurm.Place("24:00:00", options=("partition=gpu",))
    return {
        "tpu_vm.sh": tpu_vm.plan(tpu, place, keep=False),
        "tpu_vm_queued.sh": tpu_vm.plan(slices, gcloud.Place("my-project", "us-east5-a", "COMMIT", queued=True), True),
        "slurm.sh": steps(gpus, slurm.steps(gpus, nodes)),
        "gke.sh": steps(tpu, gke.steps(tpu, gke.Place("us-docker.pkg.dev/my-project/jaxlm/jaxlm:1", spot=True))),
        "local.sh": steps(two, local.steps(two, 8476, "python")),
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for stale in FOLDER.iterdir():
        stale.unlink()
    for name, text in dry_runs().items():
        (FOLDER / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
