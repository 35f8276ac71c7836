"""The command `vladva VERB [arguments]`: each verb is a file of this folder, and explains itself with --help."""

from __future__ import annotations

import ast
import importlib
import io
import os
import sys
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path

from vladva.core.cli import user_errors
from vladva.core.completions import Completions, completion_script, options_of

HERE = Path(__file__).parent
SERVE = "serve both modes over HTTP: vladva serve model=RUN [index=INDEX ...]; `vladva serve help=1` lists all"

COMPLETE = 'eval "$(vladva --completions bash)" in ~/.bashrc (or zsh in ~/.zshrc) makes the shell complete them.'


def verbs() -> dict[str, str]:
    """Verb -> the first line of what its file says of itself; nothing is imported."""
    found = {}
    for path in sorted(HERE.glob("[a-z]*.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem] = said.splitlines()[0].partition(": `")[0].rstrip(".")
    return {**found, "serve": SERVE}


def overview() -> str:
    """What `vladva --help` prints."""
    width = max(map(len, verbs()))
    lines = [f"  {verb:{width}}  {said}" for verb, said in verbs().items()]
    return "\n".join(
        ["usage: vladva VERB [arguments]", "", *lines, "", "vladva VERB --help says what a verb takes.", COMPLETE]
    )


def completions() -> dict[str, Completions]:
    """Verb -> what may follow it, as its help says."""
    from serve.config import ServeArgs
    from vladva.recipes import RECIPES

    found = {}
    for verb in verbs():
        if verb == "serve":
            found[verb] = Completions(tuple(f"{name}=" for name in ServeArgs.model_fields), {})
        elif verb == "train":  # each recipe has the same settings
            options = options_of(help_of(verb) + help_of(verb, next(iter(RECIPES))))
            found[verb] = Completions(tuple(RECIPES), options)
        else:
            found[verb] = Completions((), options_of(help_of(verb)))
    return found


def help_of(verb: str, *arguments: str) -> str:
    """What `vladva VERB ... --help` prints, in lines too narrow for columns beside each other."""
    printed, before = io.StringIO(), (sys.argv, os.environ.get("COLUMNS", ""))
    sys.argv, os.environ["COLUMNS"] = [f"vladva {verb}", *arguments, "--help"], "80"
    try:
        with redirect_stdout(printed), suppress(SystemExit):
            importlib.import_module(f"jobs.{verb}").main()
    finally:
        sys.argv, os.environ["COLUMNS"] = before
    return printed.getvalue()


@user_errors
def print_completions() -> None:
    """The script for the shell that the command line names."""
    print(completion_script("".join(sys.argv[2:3]), "vladva", completions()))


@user_errors
def print_overview() -> None:
    """All verbs."""
    print(overview())


def main() -> None:
    """Run the verb that the command line names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print_overview()
        return
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        import vladva

        print(f"vladva {vladva.__version__}")
    elif verb == "--completions":
        print_completions()
    elif verb == "serve":
        if find_spec("ray") is None:
            raise SystemExit("error: serving needs Ray: pip install 'ray[serve]'")
        os.execv(sys.executable, [sys.executable, "-m", "ray.serve.scripts", "run", "serve.app:build", *rest])
    elif verb in verbs():
        sys.argv = [f"vladva {verb}", *rest]
        importlib.import_module(f"jobs.{verb}").main()
    else:
        print(f"error: there is no verb {verb!r}; there are {', '.join(verbs())}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
