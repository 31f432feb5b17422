# Two commands matter: `make demo` and `make test`. Both set up what they need on a fresh machine
# with Python 3.11 or newer, make and git.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
WORKERS ?= 2

.PHONY: setup demo test hazards soak fuzz lint types contracts check train clean

setup: $(READY)

# Reinstalls only when the list of dependencies has changed.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Vigil needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version)."; exit 1; }
	@echo "Setting up $(VENV): a few minutes and several GB the first time (PyTorch), then never again."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' 2>$(VENV)/pip.log \
		|| { cat $(VENV)/pip.log; exit 1; }
	@touch $@
	@echo "Ready: $(BIN)/vigil --help"

demo: $(READY)
	@$(BIN)/vigil demo $(ARGS)

# Files in order on WORKERS at once: the long ones, of whole nodes, come first. A thread each, so
# that they do not get into each other's way. One worker: make test WORKERS=0
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# What an administrator tries on the first day, and what is seen: make hazards ARGS="3 8"
hazards: $(READY)
	@$(BIN)/python -m tests.e2e.day_one $(ARGS)

# Kills, outages and repetitions for as long as you like: make soak ARGS="--minutes 30 --seed 7"
soak: $(READY)
	@$(BIN)/python -m tests.e2e.soak $(ARGS)

# Hostile objects and PDUs to a whole node: make fuzz ARGS="--megabytes 1024 --seed 3"
fuzz: $(READY)
	@$(BIN)/python -m tests.fuzz_node $(ARGS)

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(READY)
	@$(BIN)/mypy

contracts: $(READY)
	@$(BIN)/lint-imports

check: lint types contracts test

# The first bundle, again, from the labelled pictures: make train DATA=folder
train: $(READY)
	@$(BIN)/vigil train --data $(DATA) $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
