# `make demo` and `make test` are all the set-up there is: each makes the environment it needs.
# PYTHON=python3.12 (a name or a path) chooses the interpreter, which gets an environment of its own.
PYTHON ?=
VENV := .venv$(if $(PYTHON),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
TESTS ?= -m "not slow and not gpu"
# Tests side by side: one process a core, each with a run of neighbouring tests, so that few fixtures are made twice.
JOBS ?= -n logical --maxprocesses 4 --dist worksteal
DEMO ?=
ASSETS ?=

.PHONY: help demo test docs users check format test-compat gpu gpu-wheels setup gl browser sim-simpler sim-simpler-original clean
.DEFAULT_GOAL := help
help:                ## show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/ready ## make the environment
$(VENV)/ready: pyproject.toml constraints.txt scripts/find_python.sh
	@echo "making the environment $(VENV): some GB, some minutes; torch comes first, then the rest"
	$$(PYTHON=$(PYTHON) sh scripts/find_python.sh) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,demo,docs]"
	touch $@

gl:                  ## check for the libraries that headless rendering needs
	@sh scripts/install_gl.sh

demo: setup gl       ## a VLA on real LIBERO tasks, dense and with reuse; table and report
	$(BIN)/lac demo $(DEMO)

browser:             ## reports and the live page are tested in Chromium
	@sh scripts/install_browser.sh

test: setup gl browser ## everything that runs in minutes on a CPU
	$(BIN)/ruff check src tests scripts examples
	$(BIN)/ruff format --check src tests scripts examples
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m pytest $(JOBS) $(TESTS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: setup          ## the site, links checked, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

users: gl            ## four new users, each from the wheel in a clean environment
	PYTHON=$(PYTHON) sh scripts/four_users.sh

check: setup         ## the linters alone
	$(BIN)/ruff check src tests scripts examples && $(BIN)/ruff format --check src tests scripts examples && $(BIN)/mypy && $(BIN)/codespell

format: setup        ## rewrite the code in the project's format
	$(BIN)/ruff check --fix src tests scripts examples && $(BIN)/ruff format src tests scripts examples

test-compat:         ## (VERSIONS=oldest) with the oldest and the newest torch, transformers, numpy, …, each in its own environment
	PYTHON=$(PYTHON) sh scripts/test_compat.sh $(VERSIONS)

gpu: setup           ## all that is worth measuring on a GPU of 80 GB, in 9 minutes, random weights: docs/gpu.md
	PYTHON=$(abspath $(BIN)/python) bash scripts/gpu_session.sh

gpu-wheels: setup    ## what that needs on a machine without an environment and without a package index, into .wheels
	PYTHON=$(BIN)/python sh scripts/carry_wheels.sh

sim-simpler: setup   ## (ASSETS=folder or archive) ManiSkill3 and a Vulkan driver; ends with an episode of each WidowX task
	@sh scripts/install_vulkan.sh .vulkan
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[data,simpler]"
	@PYTHON=$(BIN)/python sh scripts/simpler_assets.sh "$(ASSETS)"
	@if [ -f .vulkan/env.sh ]; then . .vulkan/env.sh; fi; \
	$(BIN)/lac check --suite simpler-widowx --backend ms3 --assets "$$(cat .vulkan/assets)"

sim-simpler-original: setup ## (SIMPLERENV_PYTHON=python3.10) the original SimplerEnv, in .venv-simplerenv; says what it still needs
	@sh scripts/install_vulkan.sh .vulkan
	@sh scripts/install_simplerenv.sh .venv-simplerenv
	@for file in .vulkan/env.sh .venv-simplerenv/env.sh; do if [ -f $$file ]; then . ./$$file; fi; done; \
	for what in widowx vm va; do $(BIN)/lac check --suite simpler-$$what || true; done

clean:
	rm -rf .venv .venv-* site .pytest_cache .mypy_cache .ruff_cache
