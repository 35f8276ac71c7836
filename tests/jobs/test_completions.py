"""`vladva --completions`: a real shell completes verbs, options and values, all of those that there are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import verbs
from vladva.core.completions import options_of
from vladva.export.checkpoint import DTYPES
from vladva.export.pipeline import EXPORT_FORMS
from vladva.recipes import RECIPES

ROOT = Path(__file__).parents[2]
SHELLS = [
    pytest.param(shell, marks=pytest.mark.skipif(shutil.which(shell) is None, reason=f"there is no {shell} here"))
    for shell in ("bash", "zsh")
]


def printed(shell: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", "--completions", shell]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)


@pytest.fixture(scope="module", params=SHELLS)
def script(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A shell, and the script for it."""
    done = printed(request.param)
    assert done.returncode == 0, done.stderr
    return request.param, done.stdout


def complete(script: tuple[str, str], *words: str) -> list[str]:
    """What the shell offers for the last of the words."""
    shell, text = script
    quoted = " ".join(f"'{word}'" for word in ("vladva", *words))
    asking = f'{text}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _vladva; printf "%s\\n" "${{COMPREPLY[@]}}"'
    if shell == "zsh":  # arrays begin at 1 there, unless it emulates sh, as bashcompinit has it do
        asking = asking.replace("; _vladva;", "; emulate sh; _vladva;")
    done = subprocess.run([shell, "-c", asking], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    offered = done.stdout.split()  # zsh itself leaves out what does not begin as the word does
    return [each for each in offered if each.startswith(words[-1])] if shell == "zsh" else offered


def test_verbs(script: tuple[str, str]) -> None:
    assert sorted(complete(script, "")) == sorted(verbs())
    assert complete(script, "ex") == ["export"]


def test_options_and_their_values(script: tuple[str, str]) -> None:
    assert complete(script, "export", "tiny", "--lay") == ["--layers"]
    assert tuple(complete(script, "export", "tiny", "--to", "")) == EXPORT_FORMS
    assert tuple(complete(script, "export", "tiny", "--dtype", "")) == DTYPES
    assert complete(script, "export", "tiny", "--to", "v") == ["vllm"]
    assert set(complete(script, "train", "")) == set(RECIPES)
    assert {"--train.steps", "--dry-run", "--loss.contrastive"} <= set(complete(script, "train", "tiny", "--"))
    assert "model=" in complete(script, "serve", "mo")


def test_files_are_left_to_the_shell(script: tuple[str, str]) -> None:
    assert complete(script, "export", "") == []
    assert complete(script, "embed", "tiny", "--data", "") == []


def test_what_the_help_explains_is_completed_and_nothing_it_mentions() -> None:
    text = (
        "options:\n  -k, --k K        hits, as --far does\n  --to {a,b}       where\n"
        "                   --wrapped is no option\n│ --train.x {1,2}   │\n"
    )
    assert options_of(text) == {"--k": (), "--to": ("a", "b"), "--train.x": ("1", "2")}


def test_another_shell_is_one_line() -> None:
    done = printed("fish")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --completions fish: there are scripts for bash and zsh\n"
