"""The sections of the tour's page about feedback: rankings and PPO, checked rewards, the arena."""

from jaxlm.run import side_by_side
from jaxlm.run.report import Page
from launch import rounds_page


def rankings(out: Page, results: dict, root) -> None:
    """One round of launch.rounds: results by stage, root the tour's folder."""
    collected, found, learned = (results[n] for n in ("collect_1", "evaluate_1", "reward_1"))
    out.heading("Learning from rankings")
    out.paragraph(
        "What is wanted of an answer, where demonstrations by many hands disagree, rankings say: "
        f"{collected['rankings']} of them ({collected['pairs']} pairs) by {collected['annotator']} trained a reward "
        "model, and PPO the policy against it. Gold is what people are taken to want, measured on held-out errands "
        "and never trained on; best-of-n of the policy before, by the same reward model, is what PPO has to match at "
        f"its KL. {rounds_page.left_out(collected)}"
    )
    rounds_page.numbers(out, 1, found, learned["last"])
    pictures = (
        (root / "feedback" / "report" / "round_1.png", "Gold gained over sqrt(KL), with 95% intervals."),
        (root / "feedback" / "round_1" / "ppo" / "report" / "rl.png", "PPO: reward, KL, entropy, length, clipping."),
    )
    for picture, caption in pictures:
        if picture.exists():
            out.image(picture, caption)
    for row in found["shown"]:
        said = "\n\n".join(f"{who} (gold {score:.2f}):\n{text}" for who, (text, score) in row["replies"].items())
        out.details(f"{row['kind']}: {row['asked']}", f"{said}\n\nwanted: {row['truth']}")


def checked(out: Page, result: dict, root) -> None:
    """What `tour_feedback.verify` found."""
    out.heading("Learning from checked answers")
    told = result["told"]
    out.paragraph(
        f"Problems worked by hand, in a thought: {result['steps']:,} rollouts, rewarded where the answer is right, and "
        f"{result['problems']} held-out problems before and after. A pass@1 that only nears the former greedy answers "
        "is sharper, not better. Of thoughts it says how often their answer changes on the way, from wrong to right "
        "(better) or from right to wrong (worse), and how often the first and the last answer are right."
    )
    rows = dict.fromkeys([*told["before"], *told["after"]])
    out.table(
        ["held-out problems", "before", "after"],
        [[k, *(told[w].get(k, "-") for w in ("before", "after"))] for k in rows],
    )
    if (picture := root / "verified" / "report" / "rl.png").exists():
        out.image(picture, "Reward, held-out answers, KL to the policy before, entropy, length and clipping.")


def arena(out: Page, result: dict, root) -> None:
    """What `tour_feedback.arena` found."""
    out.heading("Arena")
    out.paragraph("Elo by gold of one answer of each policy to the same held-out errands; the first has 1000.")
    rows = [[s["name"], s["elo"], f"{s['low']:.0f} to {s['high']:.0f}"] for s in result["standings"]]
    out.table(["policy", "Elo", "95% interval"], rows)
    if (picture := root / "feedback" / "report" / "arena.png").exists():
        out.image(picture, "With 95% intervals.")


def together(out: Page, result: dict) -> None:
    """What `tour_feedback.together` found."""
    out.heading("All of them side by side")
    out.paragraph("A held-out question of each kind, put to every model that was trained on the way.")
    side_by_side.add_to_page(out, result["rows"])
