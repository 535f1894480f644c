"""The page of a round, and the table of all of them."""

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.run.report import COLORS, Page, label_axes, new_figure, save_figure


def interval(e: dict, digits: int = 3) -> str:
    return f"{e['value']:.{digits}f} [{e['low']:.{digits}f}, {e['high']:.{digits}f}]"


def table(found: dict[int, dict]) -> str:
    """Markdown: a line a round, from what its `evaluate` gave."""
    head = (
        "round",
        "gold: sft",
        "gold: PPO",
        "gain, paired",
        "KL to sft",
        "best-of-n's gain there",
        "share",
        "Elo (sft 1000)",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for k, r in found.items():
        elo = next(s for s in r["elo"]["standings"] if s["name"] == f"round {k}")
        shared = interval(r["share"], 2) + (", beyond its end" if r["share"]["beyond"] else "")
        cells = (str(k), f"{r['gold']['sft']['value']:.3f}", f"{r['gold']['ppo']['value']:.3f}", interval(r["gain"]),
                 interval(r["kl"], 2), f"{r['share']['best_of_n']:.3f}", shared,
                 f"{elo['elo']:.0f} [{elo['low']:.0f}, {elo['high']:.0f}]")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[int, dict], k: int, path) -> None:
    """Draws gold gained over sqrt(KL): best-of-n by round k's reward model, and the policies of all rounds so far."""
    figure = new_figure(6.6, 4.0)
    axes = figure.add_subplot()
    points = found[k]["curve"]
    x = [max(q["kl"], 0.0) ** 0.5 for q in points]
    gain = [q["gain"] for q in points]
    axes.plot(x, [g["value"] for g in gain], ".-", color=COLORS[0], label=f"best of n, reward model {k}")
    axes.fill_between(x, [g["low"] for g in gain], [g["high"] for g in gain], color=COLORS[0], alpha=0.15, linewidth=0)
    for q, at, g in zip(points, x, gain):
        axes.annotate(str(q["n"]), (at, g["value"]), xytext=(3, -10), textcoords="offset points", fontsize=8)
    for n, r in found.items():
        g, d = r["gain"], max(r["share"]["kl"], 0.0) ** 0.5
        ends = [[g["value"] - g["low"]], [g["high"] - g["value"]]]
        axes.errorbar([d], [g["value"]], yerr=ends, fmt="o", color=COLORS[n % 7], capsize=3, label=f"PPO, round {n}")
    axes.axhline(0, color="0.6", linewidth=1)
    label_axes(axes, "sqrt(KL to sft), nats", "gold gained over sft")
    save_figure(figure, path)


def left_out(collected: dict) -> str:
    """What a round's `collect` says of prompts without a ranking; nothing where it ran before they were counted."""
    if "unranked" not in collected:
        return ""
    return (
        f"{collected['unranked']} prompts got no ranking; of a judge's verdicts {collected['malformed']} could not be "
        f"read, and {collected['missing']} were missing (too long for it, or no answer)."
    )


def numbers(page: Page, k: int, r: dict, reward: dict) -> None:
    """The figures of round k: r what its `evaluate` gave, reward the metrics of its reward model."""
    page.figures([
        (f"{r['gain']['value']:+.3f}", f"gold gained over sft [{r['gain']['low']:+.3f}, {r['gain']['high']:+.3f}]"),
        (f"{r['share']['kl']:.2f}", "nats of KL to sft"),
        (f"{100 * r['share']['value']:.0f}%", "of best-of-n's gain at that KL"),
        (f"{reward['eval/all/accuracy']:.3f}", "accuracy of the reward model on held-out pairs"),
    ])  # fmt: skip
    page.table(["gold of", "mean", "95% interval"],
               [[n, e["value"], f"{e['low']:.3f} to {e['high']:.3f}"] for n, e in r["gold"].items()])  # fmt: skip
    page.paragraph("Greedy replies are the control: what sharper sampling alone would do.", soft=True)
    names = list(next(iter(r["kinds"].values())))
    page.subheading("By what was asked")
    page.table(["kind", *names], [[kind, *row.values()] for kind, row in r["kinds"].items()])
    page.subheading("What gold is made of")
    page.table(["", *r["parts"]["sft"]], [[who, *row.values()] for who, row in r["parts"].items()])


def page(p, k: int, found: dict[int, dict], done: dict) -> Page:
    r, learned, root = found[k], done[f"reward_{k}"]["result"]["last"], p.root
    made = Page(f"Round {k}: sample, rank, retrain reward, PPO")
    collected = done[f"collect_{k}"]["result"]
    made.paragraph(
        f"{collected['rankings']} rankings ({collected['pairs']} pairs) by {collected['annotator']} trained the reward "
        f"model; gold is measured on {r['gain']['n']} held-out prompts that nothing was trained on. "
        f"{left_out(collected)}", soft=True
    )  # fmt: skip
    made.heading("Figures")
    numbers(made, k, r, learned)
    try:
        plot(found, k, root / "report" / f"round_{k}.png")
        made.image(root / "report" / f"round_{k}.png", "Gold gained over sqrt(KL), with 95% intervals.")
    except UserError as error:
        made.paragraph(str(error), soft=True)
    made.heading("Reward model")
    wanted = ("accuracy", "calibration_error", "rank_agreement", "best_found", "margin", "loss")
    made.table(["held-out prompts", "value"], [[n, learned[f"eval/all/{n}"]] for n in wanted])
    made.table(["best of", "KL", "bound", "proxy", "gold", "gold's 95% interval"], [
        [q["n"], q["kl"], q["kl_bound"], q["proxy"]["value"], q["gold"]["value"],
         f"{q['gold']['low']:.3f} to {q['gold']['high']:.3f}"] for q in r["curve"]
    ])  # fmt: skip
    curves = root / f"round_{k}" / "ppo" / "report" / "rl.png"
    if curves.exists():
        made.heading("PPO")
        made.image(curves, "Reward, held-out answers, KL to the policy before, entropy, length and clipping.")
    made.heading("Rounds")
    standings = [[s["name"], s["elo"], f"{s['low']:.0f} to {s['high']:.0f}"] for s in r["elo"]["standings"]]
    made.table(["policy", "Elo", "95% interval"], standings)
    if (root / "report" / f"elo_{k}.png").exists():
        made.image(root / "report" / f"elo_{k}.png", "Elo by the gold of one response of each to the same prompts.")
    made.heading("Transcripts")
    for row in r["shown"]:
        made.subheading(f"{row['asked']} ({row['kind']})")
        made.paragraph(f"Wanted: {row['truth']}", soft=True)
        made.table(["who", "said", "gold"], [[who, text, score] for who, (text, score) in row["replies"].items()])
    return made


def write(p, k: int, done: dict) -> dict:
    """Writes report/round_k.html, results.json and table.md."""
    found = {n: done[f"evaluate_{n}"]["result"] for n in range(1, k + 1)}
    storage.make_dir(p.root / "report")
    page(p, k, found, done).write(p.root / "report" / f"round_{k}.html")
    kept = {str(n): {name: v for name, v in r.items() if name != "shown"} for n, r in found.items()}
    rewards = {str(n): done[f"reward_{n}"]["result"]["last"] for n in found}
    storage.write_json(p.root / "results.json", {"schema_version": 1, "rounds": kept, "rewards": rewards})
    storage.write_text(p.root / "table.md", table(found))
    return {"page": f"report/round_{k}.html"}
