"""The one page that a tour ends with: what each stage found, in the order in which it was found."""

from jaxlm import storage
from jaxlm.run.report import Page
from launch import tour_page_assistant as assistant
from launch import tour_page_feedback as feedback

SHOWN = 5  # examples of what a curation step removed


def page(workdir, command: str, done: dict[str, dict]) -> Page:
    """Renders the records of a tour's stages (see `jaxlm.run.stages`) and the pictures in `workdir`."""
    root = storage.path(workdir)
    results = {name: record["result"] for name, record in done.items()}
    out = Page("An assistant, from raw text")
    _summary(out, results, sum(r["seconds"] for r in done.values()))
    _curation(out, results["curate"])
    _tokenizer(out, results["tokenize"])
    _training(out, results["pretrain"], root)
    _evaluation(out, results["evaluate"])
    _samples(out, results["sample"], root)
    assistant.facts(out, results["midtrain"], results["assist"], results["facts"], root)
    assistant.knowledge(out, results, root)
    assistant.tools(out, results["tools"])
    assistant.prompting(out, results["prompting"], root)
    feedback.rankings(out, results, root)
    feedback.checked(out, results["verify"], root)
    feedback.arena(out, results["arena"], root)
    feedback.together(out, results["side_by_side"])
    _again(out, command, root, done)
    return out


def _summary(out: Page, results: dict, seconds: float) -> None:
    trained, (bits, error) = results["pretrain"], results["evaluate"]["bits_per_byte"]
    out.paragraph(
        "Each section is one stage of the tour: the text, its tokens, the training, what came of it.", soft=True
    )
    out.figures(
        [
            (f"{trained['parameters'] / 1e6:.2f} M", "parameters"),
            (f"{trained['tokens'] / 1e6:.1f} M", "tokens trained on"),
            (f"{bits:.3f} ± {error:.3f}", "bits per byte of held-out text"),
            (f"{results['evaluate']['bound']['bits_per_byte']:.3f}", "the same for a compressor"),
            (f"{seconds / 60:.1f} min", "for the whole tour"),
        ]
    )


def _curation(out: Page, result: dict) -> None:
    out.heading("The text")
    rows = [[name, s["documents"], s["bytes"] / 1e6, s["rejected"]["texts"]] for name, s in result["sources"].items()]
    out.table(["source", "documents kept", "MB", "unreadable"], rows)
    report = result["report"]
    if report is None:
        out.paragraph("This definition takes the text as it is, without curation.")
        return
    kept = report["documents_out"] / max(1, report["documents_in"])
    out.paragraph(
        f"{report['documents_in']:,} documents went in, {report['documents_out']:,} came out ({kept:.1%}), in "
        f"{report['seconds']:.0f} s. A step sees what the one before it left."
    )
    head = ["step", "documents in", "removed", "changed", "MB out", "seconds", "why"]
    rows = [
        [
            s["step"],
            s["documents_in"],
            s["removed"],
            s["changed"],
            s["characters_out"] / 1e6,
            s["seconds"],
            ", ".join(f"{reason}: {count:,}" for reason, count in s["reasons"].items()) or "-",
        ]
        for s in report["steps"]
    ]
    out.table(head, rows)
    for step in report["steps"]:
        for example in step["examples"][:SHOWN]:
            title = f"{step['step']} removed {example['source']}/{example['id']}: {example['why']}"
            out.details(title, example["text"])


def _tokenizer(out: Page, result: dict) -> None:
    out.heading("Its tokens")
    trained = next(s for s in result["sets"] if s[1] == "training")
    out.paragraph(
        f"{result['kind']}, {result['vocab_size']:,} ids, learned on the training side alone; "
        f"{trained[4] / trained[3]:.2f} bytes a token. A held-out text as the tokenizer cuts it, with the ids:"
    )
    out.pieces(result["pieces"])
    out.paragraph("Packed into rows, whose documents do not see each other:")
    out.table(["source", "side", "rows", "tokens", "bytes of text", "documents"], result["sets"])


def _training(out: Page, result: dict, root) -> None:
    out.heading("The training")
    peak, how = result["peak"]
    rows = [
        ["updates", f"{result['steps']:,}"],
        ["tokens a second", f"{result['tokens_per_second']:,.0f} (median)"],
        ["model FLOPs utilization", f"{result['model_flops_utilization']:.1%} of {peak / 1e12:.3g} TFLOP/s, {how}"],
        ["seconds in training", f"{result['seconds']:.0f}"],
    ]
    if result["seconds_to_first_step"] is not None:
        rows.append(["seconds to the first update", f"{result['seconds_to_first_step']:.1f}"])
    rows += [[name, f"{value:.4g}"] for name, value in sorted(result["last"].items()) if name.startswith("eval/")]
    out.table(["", "at the end"], rows)
    if (curve := root / "pretrain" / "report" / "loss.png").exists():
        out.image(curve, "Loss on the training batches and on held-out text, nats per token.")
    out.paragraph(
        "Utilization counts 6 FLOPs a parameter and token, and attention without a causal discount.", soft=True
    )


def _evaluation(out: Page, result: dict) -> None:
    out.heading("What it has learned")
    bits, error = result["bits_per_byte"]
    bound = result["bound"]
    out.table(
        ["bits per byte of the same held-out text", ""],
        [
            ["the model", f"{bits:.3f} ± {error:.3f}"],
            ["a compressor that has seen the training text", f"{bound['bits_per_byte']:.3f}"],
        ],
    )
    part = f"{bound['train_bytes'] / 1e6:.1f} MB of training text"
    if bound["train_bytes"] < bound["train_bytes_in_all"]:
        part = f"the last {part} (of {bound['train_bytes_in_all'] / 1e6:.1f})"
    out.paragraph(
        f"The compressor's figure is size(training + held-out) - size(training) under LZMA2 (preset 9, extreme, a "
        f"dictionary larger than both), over {bound['heldout_bytes'] / 1e6:.2f} MB held out, after {part}.",
        soft=True,
    )
    rows = [
        [
            name,
            str(task["version"]),
            metric,
            f"{e['value']:.3f}",
            f"{e['stderr']:.3f}",
            f"{e['low']:.3f} .. {e['high']:.3f}",
        ]
        + ["-" if e["chance"] is None else f"{e['chance']:.3f}", e["n"]]
        for name, task in result["results"]["tasks"].items()
        for metric, e in task["metrics"].items()
    ]
    out.table(["task", "version", "metric", "value", "standard error", "95% interval", "chance", "items"], rows)


def _samples(out: Page, result: dict, root) -> None:
    out.heading("What it writes")
    s = result["settings"]
    out.paragraph(
        f"Sampled at temperature {s['temperature']}, top-p {s['top_p']}, seed {s['seed']}; given text is pale."
    )
    for sample in result["samples"]:
        out.continuation(sample["prompt"], sample["text"])
    found = result["distribution"]
    out.subheading("The next token")
    out.paragraph("The model's own distribution after this held-out beginning; its ten likeliest tokens:")
    out.pre(found["prompt"], wrap=True)
    out.bars([(_visible(t["token"]), t["probability"]) for t in found["next"]], ("token", "probability"))
    if (picture := root / "report" / "attention.png").exists():
        out.subheading("Who attends to whom")
        out.image(
            picture, "A panel a layer, the mean over its heads: a row is a token that looks, a column what it looks at."
        )


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "⇥")


def _again(out: Page, command: str, root, done: dict) -> None:
    out.heading("Again, and further")
    folder = root / "pretrain"
    out.paragraph("The same command goes on where it stopped, and skips what is done:")
    out.pre(command, wrap=True)
    out.paragraph("The model stands in a run directory that the other programs read:")
    out.pre(
        f"python -m launch.chat --workdir={root / 'honest'}\n"
        f"python -m launch.eval --workdir={root / 'honest'} --suite=world --tools=calculator,python,search\n"
        f"python -m launch.sample --workdir={folder} --prompt='import ' --show_probabilities=10\n"
        f"python -m launch.eval --workdir={folder} --suite={done['evaluate']['result']['results']['suite']}\n"
        "python -m launch.train --experiment=pretrain_tiny --edit=muon --workdir=runs/muon",
        wrap=True,
    )
    out.subheading("Time")
    out.table(["stage", "seconds"], [[name, r["seconds"]] for name, r in done.items()])
    out.subheading("Environment")
    start = storage.read_json(folder / "environment.json")["starts"][-1]
    git = start["git"] or {"commit": "not a git checkout", "changed": False}
    rows = [
        ["started", start["time"]],
        [
            "devices",
            f"{start['devices']['count']} x {start['devices']['kind']}, {start['platform']['cores']} CPU cores",
        ],
        ["system", f"{start['platform']['system']} {start['platform']['machine']}, Python {start['python']}"],
        ["code", git["commit"] + (", with changes" if git["changed"] else "")],
        ["packages", ", ".join(f"{name} {version}" for name, version in start["packages"].items())],
    ]
    rows += [[f"hash: {k}", v] for k, v in storage.read_json(folder / "lineage.json")["hashes"].items()]
    out.table(["", ""], rows)
