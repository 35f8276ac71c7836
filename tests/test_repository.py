"""Guards over the whole repository: its layout, its imports, its dependencies, its commands."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform/vladva"
FOLDERS = {"platform", "jobs", "serve", "cluster", "tests", ".ci", ".docs", ".github"}
JOBS = sorted((ROOT / "jobs").glob("[a-z]*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()

# Folders whose files all define the same names: one file is one plug-in, and these names are what a plug-in is.
PLUG_INS = (
    "platform/vladva/benchmarks/tasks",
    "platform/vladva/data/formats",
    "platform/vladva/losses",
    "platform/vladva/models/backbones",
    "platform/vladva/models/dual_encoders",
    "serve/routes",
)
COMMANDS = ("jobs", "cluster")  # every command has a `main`, most a `parse`


def tracked() -> list[Path]:
    """Files that git knows or would know, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    return [Path(line) for line in listing.splitlines() if (ROOT / line).exists()]


def imports(file: Path) -> set[str]:
    """Full names of the modules that a source file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


# --- layout ----------------------------------------------------------------------------------------------------------


def test_platform_is_a_source_root_and_not_a_package() -> None:
    assert not (ROOT / "platform/__init__.py").exists()
    command = [sys.executable, "-c", "import platform; print(platform.machine())"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the folder named platform comes first, and must not win
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == os.uname().machine


def test_ruff_refuses_an_init_file_there(tmp_path: Path) -> None:
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform/__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    command = [Path(sys.executable).parent / "ruff", "check", "--no-cache", "--output-format", "json", "."]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert [finding["code"] for finding in json.loads(done.stdout)] == ["A005"]


def test_there_are_no_other_top_level_folders() -> None:
    assert {path.parts[0] for path in tracked() if len(path.parts) > 1} <= FOLDERS


LONGEST = {"serve": 125}  # lines: routes, options, and the tables of what it has been through


def test_the_top_folders_say_what_they_hold() -> None:
    for folder in sorted(folder for folder in FOLDERS if not folder.startswith(".")):
        lines = (ROOT / folder / "README.md").read_text().splitlines()
        assert lines[0].startswith("# "), folder
        assert 3 <= len(lines) <= LONGEST.get(folder, 40), f"{folder}/README.md: short, or nobody reads it"


def test_every_folder_of_the_package_is_a_package_or_data() -> None:
    for folder in {file.parent for file in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").exists(), f"{folder} would be left out of the wheel"


def test_data_files_are_installed_with_the_package() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    for path in tracked():
        if path.is_relative_to("platform/vladva") and path.suffix != ".py":
            inside = path.relative_to("platform/vladva")
            assert any(fnmatch(path.name, p) for p in patterns["*"]) or any(
                fnmatch(str(inside), p) for p in patterns["vladva"]
            ), f"{path}: pyproject.toml's package-data leaves it out"


# --- names -----------------------------------------------------------------------------------------------------------


def sources() -> Iterator[Path]:
    for folder in ("platform", "jobs", "serve", "cluster"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def public_names(source: str) -> set[str]:
    """What a file defines at module level and does not hide behind an underscore."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")} - {"logger", "T"}


def is_contract(name: str, files: list[Path]) -> bool:
    """Whether the files define the name because they are plug-ins of one folder, or commands."""
    folders = {str(file.parent.relative_to(ROOT)) for file in files}
    if name in ("main", "parse"):
        return folders <= set(COMMANDS)
    return len(folders) == 1 and folders <= set(PLUG_INS)


# To be renamed. It may only get shorter.
STILL_TWICE: set[str] = set()


def test_a_public_name_has_one_meaning() -> None:
    files_of: dict[str, list[Path]] = {}
    for file in sources():
        for name in public_names(file.read_text()):
            files_of.setdefault(name, []).append(file)
    twice = {name: files for name, files in files_of.items() if len(files) > 1 and not is_contract(name, files)}
    told = {name: [str(file.relative_to(ROOT)) for file in files] for name, files in twice.items()}
    assert set(twice) <= STILL_TWICE, {name: files for name, files in told.items() if name not in STILL_TWICE}


def test_the_public_names_of_a_file() -> None:
    source = "import torch\nA = 1\nb: int = 2\n_c = 3\ndef d(): e = 1\nclass F: g = 1\nlogger = 1\n"
    assert public_names(source) == {"A", "b", "d", "F"}


# --- imports ---------------------------------------------------------------------------------------------------------


# File -> an import that belongs nowhere near it, and the contract that must say so.
PLANTED = {
    "platform/vladva/core/hashing.py": ("import vladva.train.loop", "Rooms: arrows run one way"),
    "platform/vladva/report/html.py": ("import serve.config", "The library knows neither commands nor HTTP"),
    "serve/protocol/errors.py": ("import serve.app", "HTTP: routes call deployments"),
    "platform/vladva/models/batch.py": ("import vladva.models.embedder", "Models: what is loaded"),
    "platform/vladva/train/audit_log.py": ("import vladva.train.audit", "No circles between files"),
    "platform/vladva/train/validation.py": ("import deepspeed", "Only the engine knows DeepSpeed"),
    "platform/vladva/losses/pairs.py": ("import numpy", "Losses are arithmetic on tensors"),
    "platform/vladva/benchmarks/metrics.py": ("import torch", "Metrics are arithmetic on matrices"),
}


def lint_imports(folder: Path) -> list[str]:
    """The contracts that are broken in a copy of the tree."""
    environment = os.environ | {"PYTHONPATH": f"{folder / 'platform'}:{folder}"}
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    verdicts = dict(re.findall(r"^(.+) (KEPT|BROKEN)$", done.stdout, re.MULTILINE))
    assert len(verdicts) == len(PYPROJECT["tool"]["importlinter"]["contracts"]), done.stdout + done.stderr
    return [name for name, verdict in verdicts.items() if verdict == "BROKEN"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The source files and pyproject.toml, in a folder that a test may spoil."""
    for folder in ("platform", "jobs", "serve"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=lambda _, names: {n for n in names if n == "weights"})
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.skipif(sys.version_info < (3, 11), reason="import-linter needs Python 3.11")
def test_imports_run_one_way_and_a_wrong_one_is_seen(copied: Path) -> None:
    assert lint_imports(copied) == []
    for name, (line, _) in PLANTED.items():
        with (copied / name).open("a") as file:
            file.write(f"\n{line}\n")
    broken = lint_imports(copied)
    for line, contract in PLANTED.values():
        assert any(name.startswith(contract) for name in broken), f"{line}: {contract} did not notice"


def test_no_import_is_excused() -> None:
    assert not [each["name"] for each in PYPROJECT["tool"]["importlinter"]["contracts"] if "ignore_imports" in each]


@pytest.mark.parametrize("framework", ["torch", "ray", "transformers", "peft", "deepspeed", "lance"])
@pytest.mark.parametrize(("file", "allowed"), [("platform/vladva/config.py", False), ("serve/app.py", True)])
def test_frameworks_are_imported_where_they_are_needed(framework: str, file: str, allowed: bool) -> None:
    command = [Path(sys.executable).parent / "ruff", "check", "--select", "TID253", "--output-format", "json"]
    done = subprocess.run(
        [*command, "--stdin-filename", file, "-"],
        input=f"import {framework}\n",
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert [finding["code"] for finding in json.loads(done.stdout)] == ([] if allowed else ["TID253"])


def test_the_front_door_loads_no_framework() -> None:
    modules = ["vladva", "vladva.config", "vladva.recipes", "vladva.core.storage", "vladva.data.epoch_plan"]
    heavy = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"]
    program = (
        f"import importlib, json, sys; [importlib.import_module(m) for m in {modules}]; "
        f"print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


# --- dependencies ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def requirements() -> dict[str, list[Requirement]]:
    """Extra -> what it requires; "" holds what is always required."""
    project = PYPROJECT["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    """Distribution -> the version in constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # exact, nothing local, nothing editable
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def test_constraints_cover_every_direct_dependency(
    requirements: dict[str, list[Requirement]], pins: dict[str, Version]
) -> None:
    for group in requirements.values():
        for requirement in group:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)
            assert [each.operator for each in requirement.specifier] == [">="], f"{requirement}: a lower bound"


def closure(requirements: Iterable[Requirement]) -> Iterator[Requirement]:
    """Every requirement that installing the given ones brings, direct or not; each distribution and extra once."""
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        yield requirement
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key not in seen:
                seen.add(key)
                lines = distribution(requirement.name).requires or []
                needed = (Requirement(line) for line in lines)
                waiting += [each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})]


def test_what_is_needed_is_pinned_installed_so_and_without_conflict(
    requirements: dict[str, list[Requirement]], pins: dict[str, Version]
) -> None:
    # Not `pip check`: what people install into .venv beside it is theirs.
    needed = list(closure([*requirements[""], *requirements["test"], *requirements["dev"]]))
    assert len({canonicalize_name(each.name) for each in needed}) > 100
    for requirement in needed:
        name = canonicalize_name(requirement.name)
        installed = Version(distribution(name).version)
        if name != "setuptools":  # comes with torch and with Python
            assert name in pins, f"{name} {installed} is needed but not in constraints.txt"
            assert pins[name].public == installed.public, name
        assert requirement.specifier.contains(installed, prereleases=True), (
            f"{requirement}, but {installed} is installed"
        )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="does not say there which wheel a module is of")
def test_what_is_imported_is_required(requirements: dict[str, list[Requirement]]) -> None:
    required = {canonicalize_name(requirement.name) for group in requirements.values() for requirement in group}
    distributions = packages_distributions()
    for file in sources():
        for module in top_level(imports(file)) - sys.stdlib_module_names - {"vladva", *FOLDERS}:
            absent = {"open_clip": "open-clip-torch"}.get(
                module, module
            )  # its torchvision is not there for every torch
            homes = {canonicalize_name(name) for name in distributions.get(module, [absent])}
            assert homes & required, f"{file} imports {module}, which pyproject.toml does not require"


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_job_is_executable_and_explains_itself() -> None:
    assert JOBS
    for job in JOBS:
        assert job.read_text().startswith("#!/usr/bin/env python"), job
        assert os.access(job, os.X_OK), f"{job} is not executable"

    def ask(job: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, job, "--help"], cwd=ROOT, text=True, capture_output=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        for job, done in zip(JOBS, pool.map(ask, JOBS), strict=True):
            assert done.returncode == 0, f"{job}: {done.stderr}"
            assert "usage" in done.stdout.lower(), job


def test_make_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    shown = subprocess.run(["make", "help"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert re.findall(r"^  make (\w+) ", shown, re.MULTILINE) == phony
    assert phony == [
        "help",
        "install",
        "demo",
        "check",
        "test",
        "lint",
        "format",
        "docs",
        "links",
        "bench",
        "rehearse",
        "gpu",
        "clean",
    ]


def readme_commands() -> list[str]:
    """The lines of the README's shell blocks, without comments, continuation lines joined."""
    blocks = re.findall(r"^```(?:bash|sh|console)[^\n]*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_readmes_commands_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = readme_commands()
    assert "make demo" in commands
    assert "make test" in commands
    for command in commands:
        words = command.split()
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), command
        for word in words:
            if re.match(r"(jobs|cluster|tests|serve|platform)/[\w/.-]+$", word):
                assert (ROOT / word).exists(), f"{command}: there is no {word}"


def test_the_readmes_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_table_of_cases_names_tests_that_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (ROOT / "tests/real_files.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
