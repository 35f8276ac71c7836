"""The command `vladva VERB [arguments]`: each verb is a file of this folder, and explains itself with --help."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SERVE = "serve both modes over HTTP: vladva serve model=RUN [index=INDEX ...]; `vladva serve help=1` lists all"


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
    return "\n".join(["usage: vladva VERB [arguments]", "", *lines, "", "vladva VERB --help says what a verb takes."])


def main() -> None:
    """Run the verb that the command line names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        import vladva

        print(f"vladva {vladva.__version__}")
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
