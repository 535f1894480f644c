"""Puts the same prompts to several checkpoints, such as a base model and its fine-tuned versions, side by side.

usage:
  python -m launch.compare --workdir=A --workdir=B... --prompt=TEXT... [--questions=N] [--out=PAGE.html]

A base model gets each prompt as a question in text ("Question: ... Answer:"), a chat model as a user's message.
--questions=N adds N questions of each kind from the world that the last run was trained on, with truth and verdicts.
Replies are greedy. The text is printed; --out writes a page as well.

examples:
  python -m launch.compare --workdir=runs/base --workdir=runs/sft --prompt='What is your name?'
  python -m launch.compare --workdir=runs/base --workdir=runs/sft --questions=2 --out=runs/sft/report/compare.html

Exit codes: 0 done; 2 bad input.
"""

from absl import flags

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.run import world_tasks
from jaxlm.run.load import load_run
from jaxlm.run.report import Page
from jaxlm.run.side_by_side import add_to_page, side_by_side, text
from jaxlm.run.train import use_compilation_cache
from jaxlm.sample.transcript import printable
from launch import common

WORKDIR = flags.DEFINE_multi_string("workdir", [], "Folder of a run; given once for each that is compared.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "What to ask; may be repeated.")
QUESTIONS = flags.DEFINE_integer("questions", 0, "Questions of each kind from the world of the last run.", 0)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "End a reply after so many tokens.")
OUT = flags.DEFINE_string("out", None, "HTML page to write.")


def labels(workdirs: list[str]) -> list[str]:
    """A name for each: the folder's own, with a number where two are called alike."""
    names = [storage.path(w).name or w for w in workdirs]
    return [n if names.count(n) == 1 else f"{n} ({names[: i + 1].count(n)})" for i, n in enumerate(names)]


def main() -> int:
    if not WORKDIR.value:
        raise UserError("--workdir=DIR is missing: the folder of a run, once for each that is compared")
    if not PROMPT.value and not QUESTIONS.value:
        raise UserError("nothing to ask: give --prompt=TEXT, or --questions=N for questions of the world")
    use_compilation_cache()
    runs = dict(zip(labels(WORKDIR.value), map(load_run, WORKDIR.value)))
    prompts = list(PROMPT.value)
    if QUESTIONS.value:
        talk = world_tasks.find_world(list(runs.values())[-1].experiment)
        for task in world_tasks.task_names(talk):
            prompts += [i.question for i in world_tasks.items(talk, task, QUESTIONS.value)]
    rows = side_by_side(runs, prompts, max_tokens=MAX_TOKENS.value)
    if OUT.value is not None:
        page = Page("Side by side")
        page.paragraph(", ".join(f"{label}: step {run.step}" for label, run in runs.items()), soft=True)
        add_to_page(page, rows)
        page.write(storage.path(OUT.value))
    print(printable(text(rows)))
    return 0


if __name__ == "__main__":
    common.run(main)
