"""The same prompts put to several checkpoints, such as a base model and what was made of it, to read side by side."""

from collections.abc import Mapping, Sequence

from jaxlm.data.conversation import Message, read_call
from jaxlm.data.prompting import Example
from jaxlm.data.world.answers import judge
from jaxlm.data.world.questions import Question
from jaxlm.run.ask import Asked, is_chat, replies
from jaxlm.run.load import Run
from jaxlm.run.report import Page
from jaxlm.tools import Tool


def transcript(message: Message) -> str:
    """A reply to read, a part a paragraph; thinking, calls and results are marked."""
    shown = []
    for part in message.parts:
        if part.kind == "tool_call":
            name, argument = read_call(part.text)
            shown.append(f"[{name}] {argument}")
        else:
            mark = {"thinking": "[thinking] ", "tool_result": "[result] "}.get(part.kind, "")
            shown.append(mark + part.text.strip())
    return "\n".join(shown)


def side_by_side(
    runs: Mapping[str, Run],
    prompts: Sequence[str | Question],
    *,
    shots: Sequence[Example] = (),
    max_tokens: int = 64,
    tools: Mapping[str, Tool] | None = None,
) -> list[dict]:
    """What each run answers, greedily, as one row a prompt:
    {"prompt", "answer", "replies": {label: {"form", "text", "outcome", "finish_reason"}}}.

    A base model gets a prompt as a question in text, after the `shots` if there are any; a chat model as a user's
    message, with the tools. A `Question` has its truth as "answer" and a verdict as "outcome"; a string has None.
    """
    asked = {}
    for label, run in runs.items():
        chat = is_chat(run.experiment)
        told = [(p, None) if isinstance(p, str) else (p.text, p.system) for p in prompts]
        put = [Asked(text, max_tokens, system, () if chat else tuple(shots)) for text, system in told]
        asked[label] = chat, replies(run, put, chat=chat, tools=tools if chat else None)
    rows = []
    for i, prompt in enumerate(prompts):
        truth = prompt if isinstance(prompt, Question) else None
        row = {"prompt": truth.text if truth else prompt, "answer": truth.answer if truth else None, "replies": {}}
        for label, (chat, said) in asked.items():
            one = said[i]
            row["replies"][label] = {
                "form": "chat" if chat else "text",
                "text": transcript(one.message) if one.skipped is None else f"(left out: {one.skipped})",
                "outcome": judge(truth, one.message.text).outcome if truth and one.skipped is None else None,
                "finish_reason": one.completion.finish_reason if one.completion else None,
            }
        rows.append(row)
    return rows


def _note(reply: dict) -> str:
    return ", ".join(x for x in (reply["outcome"], "cut" if reply["finish_reason"] == "length" else None) if x)


def text(rows: Sequence[dict]) -> str:
    """The rows to print."""
    lines = []
    for row in rows:
        truth = "" if row["answer"] is None else f"   (truth: {row['answer']})"
        lines.append(f"=== {row['prompt']}{truth}")
        for label, reply in row["replies"].items():
            note = _note(reply)
            lines += [f"--- {label}, {reply['form']}{f': {note}' if note else ''}", reply["text"].strip()]
        lines.append("")
    return "\n".join(lines)


def add_to_page(page: Page, rows: Sequence[dict]) -> None:
    """A table a prompt: who, what was said, the verdict."""
    for row in rows:
        page.subheading(row["prompt"])
        if row["answer"] is not None:
            page.paragraph(f"The truth: {row['answer']}", soft=True)
        replies = row["replies"].items()
        page.table(["model", "asked as", "reply", ""], [[k, r["form"], r["text"], _note(r)] for k, r in replies])
