"""Cuts a program's HLO text down to what `jaxlm.run.hlo` reads, to be kept as a golden.

usage, from the project's root: python -m tests.goldens.make_hlo PROGRAM.hlo.txt > tests/goldens/hlo/NAME.txt
(`python -m launch.compile ... --keep_hlo --out=DIR` writes the text)
"""

import re
import sys

from jaxlm.run.hlo import OPS

KEPT = re.compile(rf" (?:{'|'.join(OPS)})(?:-start)?\(| while\(| conditional\(|calls=%all-reduce-scatter")
LIMIT = re.compile(r"= s32\[\]\S* constant\(|direction=LT")
DROPPED = re.compile(
    r", backend_config=\{.*|, frontend_attributes=\{from[^}]*\}|, channel_id=\d+| stack_frame_id=\d+"
    r"|, use_global_device_ids=true"
)


def trimmed(text: str) -> list[str]:
    conditions = set(re.findall(r"condition=%?([\w.\-]+)", text))
    out, name, kept = [], "", []
    for line in text.splitlines():
        if header := re.match(r"^(ENTRY )?(%?[\w.\-]+) \(.*\{\s*$", line):
            name, kept = header[2].lstrip("%"), []
            first = f"{header[1] or ''}{header[2]} () -> () {{"
        elif line.startswith("}"):
            out += [first, *kept, "}"] if kept else []
        elif KEPT.search(line) or (name in conditions and LIMIT.search(line)):
            kept.append(DROPPED.sub("", line))
    return out


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as f:
        print("\n".join(trimmed(f.read())))
