# Every target does its own set-up, into .venv/. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
# Installed first: without a pin pip would take a CUDA build of several GB.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Two files at a time, in order: tests of many ranks wait a good part of their time, and the long files come first.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup lint demo demo-replicas test test-all test-slurm test-hosts faults check bench bench-gpu soak paper format clean

setup: $(READY)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== $(VENV): $(TORCH) (some hundred MB; two minutes in all)"
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	@echo "== $(VENV): noflush, DeepSpeed, megatron-core, transformers, and what the tests need"
	DS_BUILD_OPS=0 $(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python examples/compare.py $(if $(TEXT),--text $(TEXT))

# Two groups of two stages that average their weights; one is killed and started again. Two minutes on two cores.
demo-replicas: setup
	$(BIN)/python examples/groups.py $(if $(TEXT),--text $(TEXT))

test: setup
	@echo "== tests, two files at a time; the first dots follow once torch, DeepSpeed and Megatron are imported (half a minute)"
	$(BIN)/python -m pytest $(TWO) -m "not slow and not slurm"

test-all: setup
	tests/slurm/install.sh
	$(BIN)/python -m pytest $(TWO) -m "not slurm"
	$(BIN)/python -m pytest -m slurm

# Real SLURM daemons, a namespace a node; skipped where that cannot be (not root). Ten minutes.
test-slurm: setup
	tests/slurm/install.sh
	$(BIN)/python -m pytest -m slurm

# Other Pythons, torches and hosts, in build/hosts/ (5 GB each); half an hour or more apiece, and it can be stopped.
test-hosts: setup
	$(BIN)/python -m tests.hosts.matrix $(if $(ONLY),--only $(ONLY))

# Kills, stops and corrupts some seventy small runs, and goes on from what they leave; ten minutes on two cores.
faults: setup
	$(BIN)/python -m tests.faults.campaign --write docs/faults.md

# What CI runs besides the tests; the links are the package as it is installed, which mypy cannot see in a checkout.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/noflush
	ln -s $(CURDIR)/plugin/noflush/* $(CURDIR)/launch $(CURDIR)/patches build/types/noflush/
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest $(TWO) -m "not slow and not multiproc and not kernels and not e2e and not slurm"

bench: setup
	for gas in 1 4 8; do for stages in 4 8; do \
		$(BIN)/python tests/bench/pipeline.py --stages $$stages --gas $$gas --record || exit 1; done; done
	for gas in 1 2 4 8; do $(BIN)/python tests/bench/pipeline.py --stages 2 --gas $$gas --real --record || exit 1; done
	$(BIN)/python tests/bench/pipeline.py --stages 2 --gas 1 --forward-ms 0 --backward-ms 0 --record
	$(BIN)/python tests/bench/update.py --device cpu --record
	$(BIN)/python tests/bench/update.py --device cpu --model bf16 --record

# 20,000 updates with saves, evaluations and kills, against as many that are left alone; half an hour on two cores.
soak: setup
	$(BIN)/python tests/bench/soak.py --record

# Everything that needs a GPU, in eight minutes at most; docs/bench-gpu.md says how to read it.
bench-gpu: setup
	$(BIN)/python tests/bench/gpu.py --record

# The paper's 134 M setting, in slices that go on where they were stopped: make paper DATA=PREFIX [VALID=PREFIX]
# [VOCAB=vocab.json MERGES=merges.txt] [OUT=runs/paper] [OPTIONS="--only nadam muon"]. docs/paper.md; GPT-2's vocabulary
# is the installed one unless it is given, and a tenth of DATA is held out unless VALID is.
paper: setup
	$(BIN)/python tests/bench/paper.py $(if $(DATA),--data $(DATA)) $(if $(VALID),--valid-data $(VALID)) \
		$(if $(VOCAB),--vocab $(VOCAB)) $(if $(MERGES),--merges $(MERGES)) $(if $(OUT),--out $(OUT)) $(OPTIONS)

format: setup
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis plugin/*.egg-info
