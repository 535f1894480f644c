"""What every launch program shares: flags, one-line errors, exit codes."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from absl import app, flags, logging

from jaxlm.config import UserError
from jaxlm.run import exits


def run(main, takes_command: bool = False) -> None:
    """Runs `main()` under absl. Bad flags, `UserError`, and runs that stopped or diverged end in one line on stderr.

    takes_command: `main(words)` is given the words behind `--`, the command of another program.
    """

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except flags.Error as e:
            fail(f"{str(e).splitlines()[0]} (see --help)")
        except SystemExit:  # absl has printed the help, and calls that a failure
            sys.stdout.flush()
            sys.exit(0)

    def guarded(argv):
        words = argv[1:]
        if words and not takes_command:
            fail(f"unexpected argument {words[0]!r}: every option is --name=value (see --help)")
        try:
            code = main(words) if takes_command else main()
            sys.stdout.flush()
            if code == exits.EXIT_PREEMPTED:
                raise exits.Stopped
            sys.exit(code)
        except UserError as e:
            fail(str(e))
        except exits.Diverged as e:
            print(f"diverged: {e}", file=sys.stderr)
            sys.exit(exits.EXIT_DIVERGED)
        except exits.Stopped as e:
            print(str(e) or "stopped and saved; the same command goes on from here", file=sys.stderr)
            sys.exit(exits.EXIT_PREEMPTED)

    # Flags that programs share stand in modules of their own; --help would show those of the program's module alone.
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined if module.startswith("launch.") else ():
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    flags.FLAGS.set_gnu_getopt(True)
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it touches; --verbosity=0 brings that back
    try:
        app.run(guarded, flags_parser=parse)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(exits.EXIT_BAD_INPUT)


def seeds(texts: Sequence[str]) -> list[int]:
    """The value of a flag --seeds: whole numbers from 0 on, each once."""
    try:
        found = [int(t) for t in texts]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise UserError(f"--seeds takes whole numbers from 0 on, each once, got {','.join(texts)!r}")
    return found


def typed(interactive: bool, on_interrupt: str | None = None) -> Iterator[str]:
    """What is typed after a prompt, or the lines of standard input. Ctrl-C ends it, or shows `on_interrupt`."""
    if not interactive:
        try:
            yield from sys.stdin
        except UnicodeDecodeError as e:
            raise UserError(f"standard input is not valid UTF-8: {e.object[e.start]:#04x}") from None
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then knows the arrow keys
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
            if on_interrupt is None:
                return
            print(on_interrupt)
        except EOFError:
            print()
            return
