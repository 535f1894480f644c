"""What the runs of launch.lab say: best-of-n, the course of each policy, fits, alarms, and what is shown over seeds.

Everything is plain JSON. A course's figures are means of `window` records, so that a peak is no lucky batch.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.lab import Arm, Lab
from jaxlm.feedback import alarms
from jaxlm.feedback.overoptimization import Fit, best_of_n, best_of_n_curve, fit, gains, turnover
from jaxlm.run import statistics
from launch import lab_arm

OTHERS = tuple(c for c in alarms.CHECKS if c is not alarms.gold_falls)
STOPS = {"all alarms": alarms.CHECKS, "gold alone": (alarms.gold_falls,), "without gold": OTHERS}
KEPT = 0.9  # share of the highest gold that a remedy should keep
NAMES = ("proxy", "gold", "verifier")


# --------------------------------------------------------------------------------------------------------- one seed
def powers(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({2**i for i in range(most.bit_length())} | {most})


def best_of(scores: Mapping[str, np.ndarray], labels: Sequence[int]) -> dict:
    """By the number of labels: the points of best-of-n, the fit of gold, and how well the proxy knows the gold."""
    gold, out = scores["gold"], {}
    ns = powers(gold.shape[1])
    for count in labels:
        proxy = scores[f"proxy_{count}"]
        curve = best_of_n_curve(proxy, {"proxy": proxy, "gold": gold, "verifier": scores["verifier"]}, ns)
        gained = np.stack([best_gain(proxy, gold, n) for n in ns], 1)
        out[str(count)] = {
            "points": [{k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in p.items()}
                       for p in curve],
            "fit": fitted(fit("best-of-n", [p["d"] for p in curve], gained)),
            "accuracy": accuracy(proxy, gold),
            "correlation": float(np.corrcoef(proxy.ravel(), gold.ravel())[0, 1]),
        }  # fmt: skip
    return out


def best_gain(proxy_PN, gold_PN, n: int) -> np.ndarray:
    return best_of_n(proxy_PN, gold_PN, n) - gold_PN.mean(1)


def accuracy(proxy_PN: np.ndarray, gold_PN: np.ndarray) -> float:
    """The share of a prompt's pairs of answers that the proxy orders as the gold does."""
    half = proxy_PN.shape[1] // 2
    sides = [x[:, :half] > x[:, half : 2 * half] for x in (proxy_PN, gold_PN)]
    return float(np.mean(sides[0] == sides[1]))


def fitted(f: Fit | None) -> dict | None:
    """As JSON, which knows neither infinity nor tuples."""
    if f is None:
        return None
    found = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(f).items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


def smoothed(records: Sequence[dict], name: str, window: int) -> np.ndarray:
    """For each record the mean over the `window` records around it, fewer at the ends."""
    values, half = np.array([r[name] for r in records]), window // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def course(records: Sequence[dict], window: int, baseline: float) -> dict:
    """What became of gold in a run: where it was highest, where it ended, and where the alarms would go back to.

    baseline: gold of the initial policy. fall: from the highest to the end, with its standard error, of which a third
    or less is what a turnover needs; the error is that of the batches' means.
    """
    gold, proxy = (smoothed(records, name, window) for name in ("gold", "proxy"))
    peak, last = int(gold.argmax()), records[-min(window, len(records)) :]
    noise = {
        i: math.sqrt(sum(r["gold_error"] ** 2 for r in rows)) / len(rows)
        for i, rows in (("end", last), ("peak", records[max(0, peak - window // 2) : peak + window // 2 + 1]))
    }
    end = float(np.mean([r["gold"] for r in last]))
    out = {
        "peak": {"step": records[peak]["step"], "gold": float(gold[peak]), "proxy": float(proxy[peak]),
                 "d": records[peak]["d"]},
        "end": {"step": records[-1]["step"], "gold": end, "proxy": float(np.mean([r["proxy"] for r in last])),
                "d": float(np.mean([r["d"] for r in last]))},
        "fall": float(gold[peak]) - end,
        "fall_error": math.hypot(*noise.values()),
        "alarms": [dataclasses.asdict(a) for a in alarms.alarms(records, STOPS["all alarms"])],
        "stops": {},
    }  # fmt: skip
    for name, checks in STOPS.items():
        step, alarm = alarms.early_stop(records, checks)
        at = next(i for i, r in enumerate(records) if r["step"] == step)
        out["stops"][name] = {
            "step": step,
            "gold": float(gold[at]),
            "proxy": float(proxy[at]),
            "d": records[at]["d"],
            "alarm": None if alarm is None else alarm.what,
        }
    d, gained = gains(records, "gold", baseline)
    out["fit"] = fitted(fit("rl", d, np.array(gained)) if len({x for x in d if x > 0}) >= 2 else None)
    return out


def of_seed(x: Lab, a: Arm, root) -> dict:
    scores = lab_arm.read_scores(root)
    baseline, rl = float(scores["gold"].mean()), {}
    for name, (count, e) in a.rl.items():
        records = lab_arm.curve(x, root / name)
        rl[name] = {"labels": count, "penalty": e.objective.kl is not None, "records": records}
        rl[name] |= course(records, x.window, baseline)
    return {"baseline": baseline, "best_of_n": best_of(scores, list(a.proxy)), "rl": rl}


# -------------------------------------------------------------------------------------------------------- all seeds
def mean(values: Sequence[float]) -> dict:
    """Mean with Student's t interval over seeds; low and high are None for a single one."""
    s = statistics.summarize(values)
    half = statistics.half_width(s)
    bounds = (None, None) if half is None else (s.mean - half, s.mean + half)
    return {"value": s.mean, "low": bounds[0], "high": bounds[1], "n": s.n, "seeds": [float(v) for v in values]}


def summary(found: Mapping[int, dict], labels: Sequence[int]) -> dict:
    """found: seed -> what `of_seed` gave."""
    arms, fewest = list(found.values()), min(labels)
    plain, penalized = f"rl_{fewest}", f"rl_{fewest}_kl"
    last = {c: [r["best_of_n"][str(c)]["points"][-1] for r in arms] for c in labels}

    def kept(gold_of) -> list[float]:
        """Of each seed, the gain that stays as a share of the highest one without a penalty."""
        out = []
        for r in arms:
            highest = r["rl"][plain]["peak"]["gold"] - r["baseline"]
            out.append((gold_of(r["rl"]) - r["baseline"]) / highest if highest > 0 else 0.0)
        return out

    stops = arms[0]["rl"][plain]["stops"]
    return {
        "labels": list(labels),
        "seeds": list(found),
        "n": last[fewest][0]["n"],
        "best_of_n": {str(c): {k: mean([p[k]["value"] for p in last[c]]) for k in NAMES} for c in labels},
        "accuracy": {str(c): mean([r["best_of_n"][str(c)]["accuracy"] for r in arms]) for c in labels},
        "rises": {f"{a} to {b}": _gained(found, a, b) for a, b in [*itertools.pairwise(labels), (fewest, max(labels))]
                  if a != b},
        "rl": {name: {"peak": mean([r["rl"][name]["peak"]["gold"] for r in arms]),
                      "d_peak": mean([r["rl"][name]["peak"]["d"] for r in arms]),
                      **{what: mean([r["rl"][name]["end"][k] for r in arms])
                         for what, k in (("end", "gold"), ("proxy", "proxy"), ("d", "d"))}}
               for name in arms[0]["rl"]},
        "fits": fits(arms),
        "turnover": [r["rl"][plain]["fall"] > 3 * r["rl"][plain]["fall_error"] for r in arms],
        "kept": {
            "no remedy": kept(lambda rl: rl[plain]["end"]["gold"]),
            "KL penalty": kept(lambda rl: rl[penalized]["end"]["gold"]),
            **{f"early stop, {name}": kept(lambda rl, name=name: rl[plain]["stops"][name]["gold"]) for name in stops},
        },
    }  # fmt: skip


def fits(arms: Sequence[Mapping]) -> dict[str, dict]:
    """The curves fitted to gold, over seeds: "best-of-n, 100 labels", and by the names of the runs."""
    best = {f"best-of-n, {c} labels": [r["best_of_n"][c] for r in arms] for c in arms[0]["best_of_n"]}
    rl = {name: [r["rl"][name] for r in arms] for name in arms[0]["rl"]}
    return {name: mean_fit([r["fit"] for r in rs]) for name, rs in (best | rl).items() if all(r["fit"] for r in rs)}


def mean_fit(found: Sequence[Mapping]) -> dict:
    """Coefficients over seeds. The curve is linear in them: the mean ones' is the mean of the seeds' curves."""
    form, (alpha, beta) = found[0]["form"], (mean([f[k] for f in found]) for k in ("alpha", "beta"))
    turns = turnover(form, alpha["value"], beta["value"])
    return {"form": form, "alpha": alpha, "beta": beta, "turnover": turns if math.isfinite(turns) else None,
            "residual": mean([f["residual"] for f in found])}  # fmt: skip


def _gained(found: Mapping[int, dict], few: int, many: int) -> dict:
    """What more labels add to gold at the largest n, paired by seed."""
    last = {c: {seed: r["best_of_n"][str(c)]["points"][-1]["gold"]["value"] for seed, r in found.items()}
            for c in (few, many)}  # fmt: skip
    return dataclasses.asdict(statistics.paired_difference(last[many], last[few]))


def shown(s: Mapping) -> dict[str, bool]:
    """What the paper found, and whether it is found here: of best-of-n in the mean over seeds, else in every seed."""
    remedies = [k for k in s["kept"] if k != "no remedy"]
    kept = [any(s["kept"][k][i] >= KEPT for k in remedies) for i in range(len(s["seeds"]))]
    rises = all(d["mean"] > 0 for d in s["rises"].values())
    return {
        f"gold of the best of {s['n']} rises with the labels, in the mean": rises,
        f"gold turns over with {min(s['labels'])} labels and no penalty, every seed": all(s["turnover"]),
        f"a remedy keeps {KEPT:.0%} of the highest gain in gold, every seed": all(kept),
    }


def cell(m: Mapping, digits: int = 2) -> str:
    seeds = ", ".join(f"{v:.{digits}f}" for v in m["seeds"])
    bounds = "" if m["low"] is None else f" [{m['low']:.{digits}f}, {m['high']:.{digits}f}]"
    return f"{m['value']:.{digits}f}{bounds} ({seeds})"


FIT_HEADS = ("gold fitted by", "", "alpha", "beta", "highest at sqrt KL", "root mean square of what is left")
FORMULAS = {"best-of-n": "d (alpha - beta d)", "rl": "d (alpha - beta log d)"}


def fit_rows(s: Mapping) -> list[list[str]]:
    """Cells below `FIT_HEADS`: the coefficients of Gao et al.'s curves, d being sqrt KL."""
    return [
        [name, FORMULAS[f["form"]], cell(f["alpha"]), cell(f["beta"], 3),
         "nowhere" if f["turnover"] is None else f"{f['turnover']:.1f}", cell(f["residual"])]
        for name, f in s["fits"].items()
    ]  # fmt: skip


def table(s: Mapping) -> str:
    """Markdown: best-of-n, the runs, fits, what was kept; means over seeds with 95% intervals, and each seed."""
    lines = [f"| labels | accuracy of the proxy | proxy at n={s['n']} | gold at n={s['n']} | verifier at n={s['n']} |",
             "|---|---|---|---|---|"]  # fmt: skip
    for c in map(str, s["labels"]):
        best = s["best_of_n"][c]
        lines.append(f"| {c} | {cell(s['accuracy'][c])} | " + " | ".join(cell(best[k]) for k in NAMES) + " |")
    lines += ["", f"| more labels | what they add to gold at n={s['n']}, paired by seed |", "|---|---|"]
    for name, d in s["rises"].items():
        bounds = "" if d["low"] is None else f" [{d['low']:.2f}, {d['high']:.2f}]"
        lines.append(f"| {name} | {d['mean']:+.2f}{bounds} |")
    lines += ["", "| run | highest gold | at sqrt KL | gold at the end | proxy at the end | sqrt KL at the end |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for name, r in s["rl"].items():
        cells = [cell(r[k]) for k in ("peak", "d_peak", "end", "proxy", "d")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"| {' | '.join(FIT_HEADS)} |", "|---" * len(FIT_HEADS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in fit_rows(s)]
    lines += ["", "| remedy | share of the highest gain in gold that is kept, by seed |", "|---|---|"]
    lines += [f"| {name} | {', '.join(f'{v:.2f}' for v in values)} |" for name, values in s["kept"].items()]
    lines += ["", "| shown | |", "|---|---|"]
    lines += [f"| {what} | {'yes' if yes else 'no'} |" for what, yes in shown(s).items()]
    return "\n".join(lines) + "\n"
