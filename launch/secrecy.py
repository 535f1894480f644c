"""What looks like a secret, by the name it is given under or by its own form: no script and no manifest may hold it."""

import re

NAMES = re.compile(
    r"""(^|[_.-]) (
      \w*(TOKEN|SECRETS?|CREDENTIALS?)\d* ([_.-]|$)
    | \w*(PASS(WORDS?|WD|PHRASE|CODE)? | PWD)\d* ([_.-]|$)
    | (AUTH(ORIZATION)? | BEARER | COOKIE | JWT | PAT | DSN | WEBHOOK)\d* ([_.-]|$)
    | (DATABASE|DB|CONNECTION|CONN)_? (UR[IL]|STR|STRING)$
    | (API|ACCESS|SECRET|PRIVATE|SIGNING|ACCOUNT)?KEY\d* (_ID)?$
    )""",
    re.IGNORECASE | re.VERBOSE,
)
FORMS = re.compile(
    r"""://[^/@\s]+:[^/@\s]+@                             # a password in an address
    | https?://hooks\.                                    # whoever knows the address may post there
    | \b(hf|gh[opsu])_[A-Za-z0-9]{20} | \bgithub_pat_\w{20} | \bglpat-[\w-]{20}
    | \bsk-[\w-]{20} | \bxox[abprs]-\w | \bAIza[\w-]{30} | \b(AKIA|ASIA)[A-Z0-9]{16} | \bya29\.
    | \beyJ[\w-]{8,}\.eyJ                                # a signed token
    | -----BEGIN""",
    re.VERBOSE,
)
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
SWITCHES = ("", "0", "1", "true", "false", "none")
ASSIGNED = re.compile(r"([A-Za-z_][\w.-]*)[=:](?!//)([^\s,;&]*)")


def is_secret(name: str, value: str) -> bool:
    """Whether a value looks like a secret; a mere switch is none, whatever its name, nor is the name of a variable that
    holds one."""
    value = value.strip("()'\"")
    if value.lower() in SWITCHES or (VARIABLE.fullmatch(value) and NAMES.search(value)):
        return False
    return bool(NAMES.search(name) or FORMS.search(value))


def found(word: str) -> str | None:
    """The name under which a word of a command holds what looks like a secret, such as `token` for --set=a.token=x."""
    at, name = 0, "a part" if FORMS.search(word) else None
    while (m := ASSIGNED.search(word, at)) is not None:  # the value of one may be the assignment of another
        if is_secret(m[1], m[2]):
            name = m[1].rpartition(".")[2].lstrip("-")
        at = m.start(2)
    return name
