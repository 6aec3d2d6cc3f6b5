# `make` prints this help. The two lines that a newcomer needs: `make demo` and `make test`.
.DEFAULT_GOAL := help
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

VENV    ?= .venv
DEMO    ?= demo_out
BIN     := $(VENV)/bin
# The package and what it needs to run: enough for `make demo`
PACKAGE := $(VENV)/.package-done
# The same with the tools of notebooks, tests and layout
STAMP   := $(VENV)/.setup-done
# JupyterLab, Playwright and Voila, which only tests/test_browser.py and tests/test_review.py need
BROWSER := $(VENV)/.browser-done
# Sphinx, which only `make docs` needs
SITE    := $(VENV)/.docs-done
# The first of these that is Python 3.11 or newer makes the environment; `make setup PYTHON=...` names another one.
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)
# Notebooks tested side by side: one a core, at most four (each loads torch).
CORES   := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
WORKERS ?= $(shell n=$(CORES); echo $$((n > 4 ? 4 : n)))
# nbdev-test forks: with more than one thread each, torch's workers fight for the cores. IN_TEST would silence nbdev-export.
QUIET   := env -u IN_TEST OMP_NUM_THREADS=1 MPLBACKEND=agg

.PHONY: help setup demo test test-full lint nbtest pytest instep prepare readme docs train-weights

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the versions of constraints.txt (nothing to do the second time)

# $(1): what is installed, into a new environment where $(VENV) has none
define install
	@python=; \
	for candidate in $(PYTHONS); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make setup: Python 3.11 or newer is needed; looked for: $(PYTHONS). Name one with: make setup PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	if ! "$(BIN)/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "make setup: new environment $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear "$(VENV)"; \
	fi
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e '$(1)'
	@touch "$@"
endef

$(PACKAGE): settings.ini setup.py pyproject.toml constraints.txt
	$(call install,.)

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	$(call install,.[dev])
	@touch "$(PACKAGE)"

$(BROWSER): $(STAMP)
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,browser,review]'
	@touch "$@"

$(SITE): $(STAMP)
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch "$@"

# Flags of the demonstration, such as DEMO_FLAGS=--quick (no training) or DEMO_FLAGS='--epochs 16'
DEMO_FLAGS ?=

demo: $(PACKAGE) ## register a pair and show it, then train in less than 5 minutes; DEMO_FLAGS=--quick trains nothing
	$(BIN)/loftr-curriculum demo --out $(DEMO) $(DEMO_FLAGS)

train-weights: setup ## train what configs/weights.yaml and weights-2.yaml to -8.yaml say (hours; stop and go on at will), then put it into the package
	$(BIN)/loftr-curriculum train --config configs/weights.yaml --out runs/weights
	$(BIN)/loftr-curriculum train --config configs/weights-2.yaml --out runs/weights-2
	$(BIN)/loftr-curriculum train --config configs/weights-3.yaml --out runs/weights-3
	$(BIN)/loftr-curriculum train --config configs/weights-4.yaml --out runs/weights-4
	$(BIN)/loftr-curriculum train --config configs/weights-5.yaml --out runs/weights-5
	$(BIN)/loftr-curriculum train --config configs/weights-6.yaml --out runs/weights-6
	$(BIN)/loftr-curriculum train --config configs/weights-7.yaml --out runs/weights-7
	$(BIN)/loftr-curriculum train --config configs/weights-8.yaml --out runs/weights-8
	mkdir -p loftr_curriculum/weights && cp runs/weights-8/weights.safetensors loftr_curriculum/weights/fast.safetensors

test: lint instep nbtest pytest ## what CI runs: the layout, the in-step gate, the notebooks, pytest

lint: setup ## are layout and rules of pyproject.toml kept?
	@$(BIN)/ruff format --check --quiet . || { echo "make prepare puts the layout right"; exit 1; }
	@$(BIN)/ruff check --quiet .

nbtest: setup
	$(QUIET) $(BIN)/nbdev-test --n-workers $(WORKERS) --do-print --timing

pytest: setup
	$(QUIET) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# Sizes of the fault campaign, such as FAULTS='--images 1000 --batches 20 --trainings 20 --eyes 5'
FAULTS  ?=

test-full: test $(BROWSER) ## make test, then everything slow and the fault campaign; recorded in tests/last_full_run.md and last_fault_campaign.json
	$(QUIET) $(BIN)/python tools/full_run.py tests/last_full_run.md
	$(QUIET) $(BIN)/python tools/fault_campaign.py tests/last_fault_campaign.json $(FAULTS)

instep: setup ## are notebooks, package and README in step? (works on a copy, changes nothing)
	@$(QUIET) $(BIN)/python tools/instep.py

prepare: setup ## before a commit: lay out and clean the notebooks, export the package, make the README
	$(BIN)/ruff format --quiet nbs tests tools examples setup.py
	$(QUIET) $(BIN)/python tools/export.py
	$(QUIET) $(BIN)/python tools/readme.py

readme: setup ## README.md and README.zh-CN.md from their notebooks, the model card from the weights
	$(QUIET) $(BIN)/python tools/readme.py

docs: $(SITE) ## the site in _docs/html: guides, reference, gallery; a link that leads nowhere stops it
	$(QUIET) $(BIN)/python tools/docs.py _docs
