# Everything from a bare clone: each target makes the environment it needs. See README.md.
#   make demo      twelve prompts through one fused batch, a picture of it
#   make test      the tests that fit in CI;  make test-all: the long ones too
#   make soak      a server under load, cancels and kills, for SOAK_MINUTES (10)
#   make lint      ruff, mypy, import-linter
# On a machine without a GPU, PyTorch's CPU build is the right one: on Linux pass its package index, the CPU one that
# pytorch.org's install page names:  make demo TORCH_INDEX=https://...
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# minutes of mixed load, cancels and kills on a server; fails if a promise did not hold
SOAK_MINUTES ?= 10
SOAK_OUTPUT ?= soak.json

.PHONY: demo test test-all soak lint format clean

demo: $(VENV)/.run
	$(BIN)/flover generate --input examples/demo.jsonl --timeline demo-timeline.png

# two workers of one thread each: tests are bound by Python, and OpenMP threads of several processes slow each other
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow"

soak: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python scripts/soak.py --minutes $(SOAK_MINUTES) --output $(SOAK_OUTPUT)

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix src tests benchmarks scripts
	$(BIN)/ruff format src tests benchmarks scripts

clean:
	rm -rf $(VENV) demo-timeline.png

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned, so that no other package can pull in another build of it
$(VENV)/.torch: $(BIN)/python
	$(BIN)/python scripts/check_torch_build.py "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -e ".[plot]" "$(TORCH)"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -e ".[dev]" "$(TORCH)"
	touch $@ $(VENV)/.run
