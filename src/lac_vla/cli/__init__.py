"""The ``lac`` command: thin verbs over the library. What a verb needs is imported when that verb runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from lac_vla import __version__
from lac_vla.cli.help import option_names, overview, verb_help
from lac_vla.cli.output import console
from lac_vla.cli.verbs import VERBS, function_of
from lac_vla.errors import InputError, LacError, did_you_mean

__all__ = ["console", "main"]

RENAMED = {
    "simpler": "eval --suite simpler-vm (with --check: lac check)",
    "--vla": "--model",
    "--levers": "--options",
    "--tower-reuse": "--vision-kv-reuse",
    "--setup": "--suite",
    "--limit": "--init-states",
}
"""Verbs and options by their names of before → of now."""
SHORT = {"--state": "--state-key"}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors that the user can act on are shown without a traceback.

    Args:
        arguments: Words behind ``lac``; by default those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a terminal or log in plain ASCII cannot show becomes "?"
            stream.reconfigure(errors="replace")
    words = [_expanded(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        _run(words)
    except (LacError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:  # no file of the user's
            raise
        from rich.text import Text

        console.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise SystemExit(130) from None


def _run(words: Sequence[str]) -> None:
    verb, rest = (words[0], list(words[1:])) if words else ("", [])
    if not words or verb in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0 if words else 2)
    if verb in ("-V", "--version"):
        print(f"lac-vla {__version__}")
        raise SystemExit(0)
    _refuse_old_names([verb, *rest])
    if verb not in VERBS:
        raise InputError(f"there is no 'lac {verb}'{did_you_mean(verb, VERBS)}; lac --help lists what there is")
    function, rest = function_of(verb, rest)
    if {"-h", "--help"} & {*rest}:
        print(verb_help(verb, function))
        raise SystemExit(0)
    known = option_names(function)
    rest = [_in_full(word, known) for word in rest]
    _refuse_unknown(verb, rest, known)

    import tyro

    tyro.cli(function, prog=f"lac {verb}", args=rest)


def _refuse_old_names(words: Sequence[str]) -> None:
    for word in [*words[:1], *(word for word in words if word.startswith("--"))]:
        name = word.partition("=")[0].replace("_", "-")
        if name in RENAMED:
            raise InputError(f"{name} is called {RENAMED[name]} now")


def _refuse_unknown(verb: str, words: Sequence[str], known: Sequence[str]) -> None:
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise InputError(f"lac {verb} has no {name}{did_you_mean(name, known)}; see lac {verb} --help")


def _in_full(word: str, known: Sequence[str]) -> str:
    """Write an option's short name out, where it has one."""
    name, equals, value = word.partition("=")
    return f"{SHORT[name]}{equals}{value}" if SHORT.get(name) in known else word


def _expanded(word: str) -> str:
    """Write out the home folder where the shell did not: behind an equals sign, or in quotes."""
    name, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{name}{equals}{os.path.expanduser(value)}"
