"""What MkDocs asks while it builds the site: pages that are not written but made.

index.md, folders/*.md   the repository's own Markdown, links included
commands/VERB.md         a verb: what its file says of itself, and the options that its parser has
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
REPOSITORY = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "folders/contributing.md",
    "CHANGELOG.md": "folders/changelog.md",
    "RESULTS.md": "folders/results.md",
    **{f"{name}/README.md": f"folders/{name}.md" for name in ("platform", "jobs", "serve", "cluster", "tests")},
}
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")  # to a file, or a place in one; not to another host


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The verbs, for the navigation."""
    sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
    from jobs.__main__ import verbs

    pages = [{f"vladva {verb}": f"commands/{verb}.md"} for verb in verbs()]
    config.nav = [{"Commands": pages} if entry == {"Commands": "VERBS"} else entry for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The made pages, beside the written ones."""
    made = {page: with_links_of_the_site(source, page) for source, page in REPOSITORY.items()}
    made |= verb_pages()
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    return files


def with_links_of_the_site(source: str, page: str) -> str:
    """A file of the repository: links to others that are pages lead there, the rest become names of files."""

    def target(found: re.Match[str]) -> str:
        path = os.path.normpath(Path(source).parent / found[2])
        if path not in REPOSITORY:
            return f"{found[1]} (`{path}`)" if found[1] != path else f"`{path}`"
        return f"[{found[1]}]({os.path.relpath(REPOSITORY[path], Path(page).parent)}{found[3] or ''})"

    return LINK.sub(target, (ROOT / source).read_text())


def verb_pages() -> dict[str, str]:
    """One page a verb; `train` has the settings of a recipe, too, which are the same for all of them."""
    from jobs.__main__ import help_of, verbs
    from serve.config import ServeArgs

    pages = {}
    for verb, said in verbs().items():
        texts = [ServeArgs.listing()] if verb == "serve" else [help_of(verb)]
        texts += [help_of(verb, "tiny")] if verb == "train" else []
        also = "" if verb == "serve" else f"\n\n`jobs/{verb}.py` is the same."
        blocks = "\n\n".join(f"```text\n{text.strip()}\n```" for text in texts)
        pages[f"commands/{verb}.md"] = f"# vladva {verb}\n\n{said[0].upper()}{said[1:]}.{also}\n\n{blocks}\n"
    return pages
