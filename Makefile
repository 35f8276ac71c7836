# One .venv, made once: every target below needs it and gets it. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN    := .venv/bin
# Resolved on Python 3.11, and good for those after it. Python 3.10 gets the newest versions that it has.
PINS   := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" * (sys.version_info >= (3, 11)))')
# DeepSpeed looks for ninja on PATH, and some tools start `python`.
export PATH := $(CURDIR)/$(BIN):$(PATH)
STAMP  := .venv/.installed
# The report's pages are tested in a real Chromium. Where there is none their tests are left out, never in CI.
CHROMIUM := $(or $(CI),$(shell command -v chromium || command -v chromium-browser || command -v google-chrome))
PYTEST   := $(BIN)/python -m pytest
# What starts neither Ray nor a browser runs on every core, each file in one process; the tests' models are too small
# for more threads than one. The rest has the machine to itself.
ALONE    := ray $(if $(CHROMIUM),or browser,and not browser)
SPREAD   := OMP_NUM_THREADS=1 $(PYTEST) -n auto --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install demo check test lint format docs links bench rehearse gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## create .venv with the exact versions of constraints.txt (again only when they change)

demo: $(STAMP)  ## the whole chain on this machine: train, embed, index, search, serve, report
	$(BIN)/python -m jobs.demo

check: lint  ## lint, and the quick tests that need neither Ray nor a browser, before every push
	$(SPREAD) -m "not ray and not browser and not slow" --durations=3

# In the order of the files: the rehearsal, which waits much, begins early.
test: $(STAMP)  ## run the tests, in two parts: what can share the machine, and what cannot; both, even if one fails
	@failed=0; \
	$(SPREAD) --no-loadscope-reorder -m "not ray and not browser" || failed=1; \
	$(PYTEST) -m "$(ALONE)" || failed=1; \
	exit $$failed
	@$(if $(CHROMIUM),,echo "Left out: tests marked browser, as no chromium is on PATH (on Debian: apt-get install chromium).")

lint: $(STAMP)  ## check style, spelling, the direction of imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the code as `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## the documentation as a site, in build/site; a warning or a link that leads nowhere is an error
	$(BIN)/pip install --disable-pip-version-check --quiet $(PINS) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet -f .docs/mkdocs.yml
	$(PYTEST) tests/test_site.py -m "not ray"  # the examples that start Ray are run by make test

links: $(STAMP)  ## fetch every link of the documentation to other hosts, and list those that are dead; needs the network
	$(BIN)/python .docs/check_links.py

bench: $(STAMP)  ## run the side-by-side benchmarks, one after the other; each ends with one line of JSON
	set -e; for script in $(filter-out tests/bench/gpu.py tests/bench/mistakes.py tests/bench/composed.py tests/bench/effects.py tests/bench/emoji.py tests/bench/vllm_servers.py,$(wildcard tests/bench/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

rehearse: $(STAMP)  ## a cluster of three hosts on this machine, and all that can happen to it; Linux, root
	$(BIN)/python tests/cluster/rehearsal/run.py

gpu: $(STAMP)  ## on a machine with a GPU: its tests, then training, embedding and serving measured; a line of JSON last
	$(PYTEST) tests/gpu
	$(BIN)/python tests/bench/gpu.py

clean:  ## delete what the demo, the tests and the tools wrote, runs in .vladva included; .venv stays
	rm -rf .vladva .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist platform/*.egg-info
	find jobs serve cluster platform tests -name __pycache__ -prune -exec rm -rf {} +

# clip-benchmark goes apart, without what it requires (torchvision): the tests compare scores with a few functions of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --disable-pip-version-check --quiet $(PINS) -e '.[test,dev]'
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --upgrade --target .venv/peers clip-benchmark==1.6.2
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --upgrade --target .venv/torchvision torchvision==0.29.1
	: > .venv/torchvision/torchvision/_meta_registrations.py
	DS_ACCELERATOR=cpu $(BIN)/python -c "from vladva.train.engine import compile_operators as c; c()" >/dev/null \
	  || echo "DeepSpeed's operator could not be compiled: training on CPUs needs a C++ compiler (on Debian: g++)."
	touch $@
