"""Guards over the whole repository: its layout, its imports, its dependencies, its commands."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform/vladva"
FOLDERS = {"platform", "jobs", "serve", "cluster", "tests", ".ci"}
JOBS = sorted((ROOT / "jobs").glob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()

# What a driver may load when it only reads a configuration, lists files, plans an epoch or scores a matrix.
LIGHT = ("config", "recipes", "prompts", "storage", "plan", "metrics")
HEAVY = ("torch", "ray", "transformers", "peft", "deepspeed", "lance")


def tracked() -> list[Path]:
    """Files that git knows or would know, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    return [Path(line) for line in listing.splitlines() if (ROOT / line).exists()]


def imports(file: Path, *, module_level_only: bool = False) -> set[str]:
    """Full names of the modules that a source file imports."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if module_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
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


# --- imports ---------------------------------------------------------------------------------------------------------


def test_light_modules_load_no_framework() -> None:
    modules = [f"vladva.{name}" for name in LIGHT]
    program = (
        f"import importlib, json, sys; [importlib.import_module(m) for m in {modules}]; "
        f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_the_check_for_frameworks_does_find_one() -> None:
    program = f"import torch, json, sys; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=True)
    assert json.loads(done.stdout) == ["torch"]


def test_losses_and_metrics_know_no_framework() -> None:
    for file in (PACKAGE / "losses").glob("*.py"):
        outside = {name for name in imports(file) if name and not name.startswith("vladva.losses")}
        assert top_level(outside) - sys.stdlib_module_names <= {"torch"}, file
    assert top_level(imports(PACKAGE / "metrics.py")) - sys.stdlib_module_names <= {"numpy"}


def test_only_the_engine_knows_deepspeed() -> None:
    knowing = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py") if "deepspeed" in top_level(imports(file))}
    assert knowing == {"platform/vladva/engine.py"}


def test_the_library_imports_neither_jobs_nor_serve() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert not top_level(imports(file)) & {"jobs", "serve", "cluster", "tests"}, file


def sources() -> Iterator[Path]:
    for folder in ("platform", "jobs", "serve", "cluster"):
        yield from (ROOT / folder).rglob("*.py")


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
    assert phony == ["help", "install", "demo", "test", "lint", "bench", "clean"]


def readme_commands() -> list[str]:
    """The lines of the README's shell blocks, without comments, continuation lines joined."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
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
