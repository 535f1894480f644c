"""The sections of the tour's page about the assistant: facts, knowing its limits, tools, prompts."""

from jaxlm.feedback.probe import GROUPS
from jaxlm.run import side_by_side
from jaxlm.run.report import Page

GROUP_NAMES = {
    "often": "told often",
    "once": "told once",
    "withheld": "told nowhere, of a known person",
    "stranger": "told nowhere, of a stranger",
    "other": "other",
}
SCORE_NAMES = {
    "logprob": "log-probability of the whole reply",
    "mean_logprob": "log-probability per token of it",
    "answer_logprob": "log-probability of what is answered after the thought",
    "least_logprob": "log-probability of the reply's least likely token",
    "agreement": "share of samples that agree with it",
}
REPLY = 400  # characters of a reply that are shown


def _share(estimate: dict | None) -> str:
    """A share with its 95% interval."""
    if estimate is None:
        return "-"
    return f"{estimate['value']:.3f}  ({estimate['low']:.3f} .. {estimate['high']:.3f})"


def _cut(text: str) -> str:
    return text if len(text) <= REPLY else text[:REPLY] + " ..."


def training(out: Page, result: dict, name: str, root) -> None:
    """One fine-tuning, in short."""
    out.paragraph(
        f"{name}: {result['steps']:,} updates in {result['seconds']:.0f} s, "
        f"{result['tokens_per_second']:,.0f} tokens a second (median, padding counted)."
    )
    if (curve := root / "report" / "loss.png").exists():
        out.image(curve, "Loss on what the assistant says, in training conversations and in held-out ones.")


def facts(out: Page, middle: dict, trained: dict, result: dict, root) -> None:
    out.heading("From text to answers")
    out.paragraph(
        "The base model has read about all of these people. It then learns what a conversation looks like: the "
        "same biographies as thoughts, and problems, but no question that memory would answer. Fine-tuning asks "
        "about some of the people and has not a word about the others. The questions here use wordings that no "
        "conversation has. An answer must be the truth and nothing else."
    )
    rows = [
        [r["model"], r["asked about"], _share(r["accuracy"]), (r["accuracy"] or {"n": 0})["n"]] for r in result["rows"]
    ]
    out.table(["model", "asked about", "exact match (95% interval)", "questions"], rows)
    out.table(
        ["question", "the truth", "the assistant's reply", ""],
        [[x["text"], x["answer"], _cut(x["reply"]), x["outcome"]] for x in result["shown"]],
    )
    training(out, middle, "The form of conversations", root / "midtrain")
    training(out, trained, "Fine-tuning on conversations about people", root / "assistant")


def knowledge(out: Page, results: dict, root) -> None:
    before, after = results["probe"], results["reprobe"]
    out.heading("Knowing what it knows")
    made = ", ".join(f"{n:,} {c}" for c, n in before["lessons"].items())
    out.paragraph(
        "The assistant was asked each question of its training side several times. What it never gets right it is "
        "taught not to know, what it gets right now and then to hedge, and what it knows to keep: "
        f"{made}. This last fine-tuning reads the biographies again, as midtraining did: without them it refuses "
        "what is merely known. Then the held-out side is asked, before and after."
    )
    compared, threshold = after["compared"], after["threshold"]["test"]
    rows = []
    for name in ("often", "once", "told"):
        if side := compared["known"].get(name):
            other = threshold["known"][name]
            lost = f"{100 * side['lost']['value']:.1f}"
            other_lost = f"{100 * other['lost']['value']:.1f}"
            rows.append([f"right, {name}", _share(side["before"]), _share(side["after"]), f"{lost} points lost"])
            rows[-1] += [_share(other["after"]), f"{other_lost} points lost"]
    for name in ("withheld", "stranger", "untold"):
        if side := compared["unknown"].get(name):
            other = threshold["unknown"][name]
            rows.append([f"wrong, {name}", _share(side["before"]), _share(side["after"]), _fall(side)])
            rows[-1] += [_share(other["after"]), _fall(other)]
    out.table(["held-out facts", "before", "after", "", "by a threshold instead", ""], rows)
    out.paragraph(
        "told: often or once. withheld: true, told nowhere, of a person who is mentioned. stranger: of a person who is "
        "mentioned nowhere. untold: both. The threshold refuses replies whose log-probability per token, thought "
        "included, is low; it is chosen on the training side to lose at most "
        f"{100 * after['threshold']['most_lost']:.0f} points of coverage there.",
        soft=True,
    )
    _thresholds(out, compared, after.get("thresholds", {"mean_logprob": after["threshold"]}))
    for picture, caption in (
        ("risk_coverage.png", "Wrong answers on facts told nowhere against right ones on facts told: every threshold."),
        ("reliability.png", "How often answers are right, against how often samples agree with them."),
    ):
        if (root / "probe" / picture).exists():
            out.image(root / "probe" / picture, caption)
    out.subheading("With the book open")
    rows = []
    for name, found in after["summaries"].items():
        for group in GROUPS:
            if mine := found["groups"].get(group):
                shares = [_share(mine[o]) for o in ("right", "wrong", "abstained")]
                rows.append([name, GROUP_NAMES[group], *shares, mine["right"]["n"]])
    out.table(["probe", "facts", "right", "wrong", "says that it does not know", "questions"], rows)
    out.table(
        ["question", "the truth", "told", "before", "after", ""],
        [
            [x["text"], x["answer"], GROUP_NAMES[x["group"]], _cut(x["before"]), _cut(x["after"]), x["outcome"]]
            for x in after["shown"]
        ],
    )
    training(out, results["honest"], "Fine-tuning on what the probe wrote", root / "honest")


def _thresholds(out: Page, compared: dict, thresholds: dict[str, dict]) -> None:
    """Fine-tuning, and refusing by each score instead."""
    rows = []
    for name, found in {"fine-tuning": compared, **{s: t["test"] for s, t in thresholds.items()}}.items():
        told, unknown = found["known"].get("told"), found["unknown"]
        lost = "-" if told is None else f"{100 * told['lost']['value']:.1f} points"
        sides = [unknown.get(side) for side in ("withheld", "stranger", "untold")]
        wrong = [_share(side["after"]) if side else "-" for side in sides]
        rows.append([SCORE_NAMES.get(name, name), _share(told and told["after"]), lost, *wrong])
        rows[-1].append(_fall(sides[-1]) if sides[-1] else "-")
    head = ["refusing by", "right, told", "lost", "wrong, withheld", "wrong, stranger", "wrong, untold", ""]
    out.table(head, rows)


def _fall(side: dict) -> str:
    if side["factor"] is None:
        return f"none left (at least {side['factor_low']:.1f} times fewer)"
    return f"{side['factor']:.1f} times fewer"


def tools(out: Page, result: dict) -> None:
    out.heading("Tools")
    out.paragraph(
        f"The same questions without tools and with {', '.join(result['tools'])} offered. A call stops the decoder, "
        "runs, and its result goes into the turn as tokens that the model did not sample."
    )
    rows = [
        [r["kind"], r["needed"] or "none", *(_share(r.get(k)) for k in ("without", "with", "called", "spare"))]
        for r in result["rows"]
    ]
    head = ["right without", "right with", "called one", "of those right without"]
    out.table(["held-out questions", "tool needed", *head], rows)
    out.table(["over all questions", "share"], [[k, _share(e)] for k, e in result["metrics"].items()])
    calls = result["calls"]
    names = sorted(k.split("/")[1] for k in calls if k.endswith("/calls") and k != "tools/calls")
    keys = {**{name: f"tools/{name}" for name in names}, "all": "tools"}
    rows = [[name, *(f"{calls[f'{key}/{what}']:,.0f}" for what in ("calls", "failures"))] for name, key in keys.items()]
    out.table(["tool", "calls made", "of them failed"], rows)
    for x in result["shown"]:
        said = "\n".join(f"[{kind}] {text}" for kind, text in x["parts"])
        out.details(f"{x['kind']}: {x['text']}", f"{_cut(said)}\n\nthe truth: {x['answer']}")


def prompting(out: Page, result: dict, root) -> None:
    out.heading("Examples in the prompt")
    out.paragraph("Accuracy on held-out questions against the number of worked examples before them.")
    if (root / "prompting" / "shots.png").exists():
        out.image(root / "prompting" / "shots.png", "Dashed: the examples show their steps. Bands: 95% intervals.")
    rows = [
        [label, task, metric, _share(e)]
        for label, found in result["shots"].items()
        for task, of in found["tasks"].items()
        for metric, e in of["metrics"].items()
    ]
    out.table(["model", "task", "prompt", "accuracy"], rows)
    out.heading("Side by side")
    side_by_side.add_to_page(out, result["side_by_side"])
