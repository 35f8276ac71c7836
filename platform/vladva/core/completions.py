"""Completions for shells: the script that `vladva --completions bash` prints, made of what the verbs' help says.

Help is what users read, so what is completed is what is there; no parser has to be described a second time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

SHELLS = ("bash", "zsh")
OPTION_COLUMN = re.compile(r"^(?:  |│ )(-.*)")  # of argparse, and of tyro; lines that go on are further to the right


class Completions(NamedTuple):
    """What may follow a verb."""

    first: tuple[str, ...]  # its first argument, where that is one of a few words
    options: dict[str, tuple[str, ...]]  # option -> its values, where they are a few words


def options_of(help_text: str) -> dict[str, tuple[str, ...]]:
    """The long options that a help text explains, each with the words it takes where those are listed: {a,b}."""
    found: dict[str, tuple[str, ...]] = {}
    for line in help_text.splitlines():
        column = OPTION_COLUMN.match(line)
        if column:
            named = re.split(r"\s{2,}", column[1])[0]
            choices = re.search(r"\{([^}\s]+)\}(?!\|)", named)
            values = tuple(choices[1].split(",")) if choices else ()
            found |= dict.fromkeys(re.findall(r"--[a-z][\w.-]*", named), values)
    return found


def completion_script(shell: str, command: str, verbs: Mapping[str, Completions]) -> str:
    """The script that makes a shell complete `command VERB ...`; files where nothing else is known.

    Raises ValueError for a shell that is not one of SHELLS.
    """
    if shell not in SHELLS:
        raise ValueError(f"--completions {shell}: there are scripts for {' and '.join(SHELLS)}")
    lines = (
        ["autoload -U +X compinit && compinit", "autoload -U +X bashcompinit && bashcompinit"] if shell == "zsh" else []
    )
    lines += [
        f"_{command}() {{",
        "  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} verb=${COMP_WORDS[1]} words=",
        '  case "$COMP_CWORD $word" in',
        f'    "1 "*) words="{" ".join(verbs)}";;',
        '    *" -"*) case "$verb" in',
        *(f'      {verb}) words="{" ".join(of.options)}";;' for verb, of in verbs.items()),
        "    esac;;",
        "  esac",
        '  case "$COMP_CWORD $verb" in',
        *(f'    "2 {verb}") words="$words {" ".join(of.first)}";;' for verb, of in verbs.items() if of.first),
        "  esac",
        '  case "$verb $before" in',
    ]
    for verb, of in verbs.items():
        lines += [f'    "{verb} {name}") words="{" ".join(values)}";;' for name, values in of.options.items() if values]
    lines += [
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        f"complete -o default -F _{command} {command}",
    ]
    return "\n".join(lines)
