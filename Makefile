# Every target does its own set-up: .venv is made on first use, and again when pyproject.toml changes.
#   make demo            watch Atlas being corrected       make test     the quick tests
#   make check           format, lint, types               make slow     the slow tests
#   PYTHON=python3.12 make test      another interpreter (3.11 or newer)
#   TORCH=torch==2.13.0+cu130 ...    another build of PyTorch

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
OLDEST ?= .venv-oldest
BIN    := $(VENV)/bin
WEIGHTS := src/errata/atlas/weights
STAMP  := $(VENV)/.installed

# The lower end of the range of transformers in pyproject.toml, and the tests that touch its internals or the weights.
TRANSFORMERS_OLDEST := transformers==4.57.*
TESTS_OLDEST        := tests/test_anatomy.py tests/test_hooks.py tests/test_tokens.py tests/test_loading.py tests/test_steering.py tests/test_patch.py tests/test_sake.py tests/test_value_search.py tests/test_low_rank.py tests/test_rome.py

.DEFAULT_GOAL := help
.PHONY: help install demo test slow check format bench atlas test-oldest clean

help:  ## list the targets
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install: $(STAMP)  ## make the virtual environment (the other targets do it too)

# PyTorch first and alone, so that nothing that depends on it chooses another build.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "errata needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes, most of it PyTorch) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

demo: $(STAMP)  ## correct Atlas's outdated facts before your eyes, then take the corrections back
	@$(BIN)/errata demo

test: $(STAMP)  ## the quick tests, one process for each core
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

slow: $(STAMP)  ## the slow tests
	@$(BIN)/python -m pytest -m slow

check: $(STAMP)  ## format, lint and types, without changing a file
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(STAMP)  ## let ruff format and repair
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP)  ## every script in benchmarks/ but learned.py and streams.py, which are told a method
	@for script in $(filter-out %/learned.py %/streams.py,$(sort $(wildcard benchmarks/*.py))); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

atlas: $(STAMP)  ## train Atlas from scratch (hours; resumable) and write its weights into the package
	@$(BIN)/python -m errata.atlas.train --out runs/atlas
	@$(BIN)/python -m errata.atlas.train --out runs/atlas --export $(WEIGHTS)/atlas
	@$(BIN)/errata calibrate --model $(WEIGHTS)/atlas --false-positive-rate 0.005 --out $(WEIGHTS)/atlas/errata-scope.safetensors

atlas-%: $(STAMP)  ## train atlas-llama, atlas-t5, atlas-bert or atlas-docket (resumable) and write its weights into the package
	@$(BIN)/python -m errata.atlas.train --architecture $* --out runs/$@
	@$(BIN)/python -m errata.atlas.train --architecture $* --out runs/$@ --export $(WEIGHTS)/$@
	@test $@ != atlas-llama || $(BIN)/errata calibrate --model $(WEIGHTS)/$@ --false-positive-rate 0.005 \
		--out $(WEIGHTS)/$@/errata-scope.safetensors

$(OLDEST)/.installed: pyproject.toml
	@echo "Setting up $(OLDEST) ..."
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable . "$(TRANSFORMERS_OLDEST)" pytest
	@touch $@

test-oldest: $(OLDEST)/.installed  ## the tests that touch its internals, under the oldest transformers allowed
	@$(OLDEST)/bin/python -m pytest $(TESTS_OLDEST)

clean:  ## remove the environments and caches; keeps runs/ and the weights
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache build dist
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
