"""Over-optimization of a proxy reward, in miniature: what best-of-n and reinforcement learning do to the gold reward.

usage:
  python -m launch.lab --workdir=DIR [--seeds=0,1,2] [--labels=100,400,3200] [--set=PATH=VALUE]...

After "Scaling Laws for Reward Model Overoptimization" (Gao et al. 2022, arXiv 2210.10760). For each seed a policy of
130 k parameters learns to write strings of a random chain. The gold, which says what is wanted, is a bigger network
with random parameters, less a price for leaving the chain. It chooses between two samples of the policy, as often as
--labels says, and a proxy learns from the choices. The proxy is then optimized: by the best of up to n samples, and by
reinforcement learning, without a KL penalty against the proxies with the fewest and the most labels, and with one
against the former. Proxy, gold and KL are recorded along each run.

What it answers, with an interval over seeds:
  does gold at the largest n rise with the number of labels?
  does gold turn over in reinforcement learning against the proxy with the fewest labels?
  how much of its highest gold is kept by a KL penalty, and by going back to where the alarms say (feedback/alarms.py)?

Settings: those of experiments/lab.py, such as --set=rl.train.steps=300 --set=kl.coefficient=0.2 --set=samples=1024.

examples:
  python -m launch.lab --workdir=runs/lab
  python -m launch.lab --workdir=runs/lab --seeds=0,1,2,3,4
  python -m launch.lab --workdir=runs/noisy --labels=50,6400 --set=kl.coefficient=0.3

The same command again goes on where it stopped. In the workdir: results.json, table.md, report/index.html, and for each
seed the run directories policy, gold, proxy_LABELS, rl_LABELS and rl_LABELS_kl.
Exit codes: 0 done; 42 stopped and saved, start the same command again; 2 bad input; 3 diverged.
"""

from collections.abc import Sequence

from absl import flags

from experiments.lab import arm, small
from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.run import exits, stages
from jaxlm.run.train import use_compilation_cache
from launch import common, lab_arm, lab_page, lab_results

WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds everything.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, with commas between.")
LABELS = flags.DEFINE_list("labels", ["100", "400", "3200"], "Numbers of labels, with commas between.")
SET = flags.DEFINE_multi_string("set", [], "path=value in the definition; may be repeated.")

FEWEST = 50  # labels: below, no prompt of them may be left to validate


def lab(workdir, seeds: Sequence[int], labels: Sequence[int], sets: Sequence[str]) -> dict:
    """Runs what is not done, one seed after the other; writes and returns the results. `exits.Stopped` when stopped."""
    own, root, labels = small(), storage.path(workdir), sorted(labels)
    x = config.parse_sets(own, sets)
    if x.prompts < 2 or x.samples < 2 or x.window < 1:
        raise UserError(f"prompts and samples must be at least 2, window 1: {x.prompts}, {x.samples}, {x.window}")
    use_compilation_cache()
    found = {}
    for seed in seeds:
        folder = root / str(seed)
        a, shipped = arm(x, labels, seed, str(folder)), arm(own, labels, seed, str(folder))
        definition = config.to_dict(x) | {"labels": labels, "seed": seed}

        def say(line: str, seed=seed) -> None:
            print(f"seed {seed} {line.partition(' (--redo')[0]}", flush=True)

        done = stages.run(folder, lab_arm.stages(x, a, shipped, folder), definition, say=say)
        found[seed] = lab_results.of_seed(x, a, folder) | {"seconds": sum(r["seconds"] for r in done.values())}
    results = {"schema_version": 1, "definition": config.to_dict(x), "seeds": list(seeds), "labels": labels,
               "arms": {str(seed): r for seed, r in found.items()},
               "summary": lab_results.summary(found, labels)}  # fmt: skip
    storage.write_json(root / "results.json", results)
    storage.write_text(root / "table.md", lab_results.table(results["summary"]))
    command = " ".join(["python -m launch.lab", f"--workdir={workdir}", f"--seeds={','.join(map(str, seeds))}",
                        f"--labels={','.join(map(str, labels))}", *(f"--set='{s}'" for s in sets)])  # fmt: skip
    lab_page.write(results, command, root / "report")
    return results


def _labels(texts: Sequence[str]) -> list[int]:
    try:
        found = [int(t) for t in texts]
    except ValueError:
        found = []
    if not found or min(found) < FEWEST or len(set(found)) < len(found):
        raise UserError(
            f"--labels takes whole numbers, each once and at least {FEWEST}, of which a part validates, got "
            f"{','.join(texts)!r}"
        )
    return found


def main() -> int:
    if WORKDIR.value is None:
        raise UserError("--workdir=DIR is missing: the folder that is to hold everything")
    seeds, labels = common.seeds(SEEDS.value), _labels(LABELS.value)
    results = lab(WORKDIR.value, seeds, labels, SET.value)
    print(
        f"\n{lab_results.table(results['summary'])}\nlook at  {storage.path(WORKDIR.value) / 'report' / 'index.html'}"
    )
    return exits.EXIT_DONE


if __name__ == "__main__":
    common.run(main)
