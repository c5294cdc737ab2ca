"""The command line.

`lab exec` passes on its command's exit code.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from coloebpf import __version__
from coloebpf.errors import ColoError, NoServiceError
from coloebpf.lab import arguments as lab
from coloebpf.service.commands import arguments as service

EXIT_CODES = """\
exit codes: 0 done; 1 could not be done, or a check failed (a sentence says what); 2 wrong usage; 3 no service answers;
70 a mistake of coloebpf's own; 130 interrupted; 141 the reader of the output went away"""
EXIT_FAILED = 1
EXIT_NO_SERVICE = 3
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130  # what shells report for a process that SIGINT ended
EXIT_BROKEN_PIPE = 141  # likewise SIGPIPE
DEBUG = "COLOEBPF_DEBUG"  # environment: a traceback for whoever reports a mistake


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except NoServiceError as error:
        return _fail(str(error), EXIT_NO_SERVICE)
    except ColoError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Python would try once more at its end, and say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except PermissionError as error:
        where = os.fsdecode(error.filename) if error.filename else "the kernel"
        return _fail(f"{where}: {error.strerror}; run it as root", EXIT_FAILED)
    except Exception as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        return _fail(
            f"a mistake of coloebpf's own: {type(error).__name__}: {error} ({where}); "
            f"please report it with the output of {DEBUG}=1 coloebpf ...",
            EXIT_BUG,
        )


def _fail(sentence: str, code: int) -> int:
    print(f"coloebpf: {sentence}", file=sys.stderr)
    return code


def _run(words: list[str]) -> int:
    command: list[str] | None = None
    if "--" in words:
        split = words.index("--")
        words, command = words[:split], words[split + 1 :]
    arguments = parser()
    args = arguments.parse_args(words)
    if command is not None and not args.takes_command:
        arguments.error(f"'{args.title}' runs no command")
    if command is None and args.takes_command == "always":
        arguments.error(f"'{args.title}' needs a command after '--'")
    if command == []:
        arguments.error("there is no command after '--'")
    args.command = command or []
    args.usage_error = arguments.error
    code = int(args.run(args) or 0)
    sys.stdout.flush()  # here, where a reader that went away is no traceback
    return code


def parser() -> argparse.ArgumentParser:
    """The whole command line; man page and completion are made of it (deploy/debian/build)."""
    whole = argparse.ArgumentParser(
        prog="coloebpf", description="Non-stop service for Xen guests.", epilog=EXIT_CODES, allow_abbrev=False
    )
    whole.add_argument("--version", action="version", version=f"coloebpf {__version__}")
    areas = whole.add_subparsers(metavar="COMMAND", required=True)
    service.add(areas)
    lab.add(areas)
    return whole
