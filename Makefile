# `make run` and `make test` are all that a newcomer needs: each sets up what it uses.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The version tested here. On a GPU machine give the build that fits its driver: make run TORCH=torch
TORCH ?= torch==2.13.0

.PHONY: run install test test-all quick lint types bench-a2a validate-testbed compare-strategies ablation bench-layer faults testbed-packages clean FORCE

run: $(VENV)/run.stamp
	$(BIN)/python -m piper_hpc.launch $(ARGS)

# Install alone: nothing is trained, as befits a login node.
install: $(VENV)/run.stamp

# Tests beside each other, in units and turns of tests/conftest.py. One test under a debugger: ARGS="-n0 --pdb tests/..."
BESIDE = --dist loadgroup --no-loadscope-reorder

# Every test, of large matrices a covering part: 21 minutes on two cores.
test: $(VENV)/test.stamp testbed-packages
	$(BIN)/python -m pytest -n auto $(BESIDE) $(ARGS)

# With the whole of every matrix.
test-all: $(VENV)/test.stamp testbed-packages
	$(BIN)/python -m pytest -n auto $(BESIDE) --full $(ARGS)

# The tests that start no Slurm, no ranks and no long commands: under two minutes on two cores. Where a test does not
# say how many examples hypothesis makes, it makes 20 of 100.
quick: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n logical $(BESIDE) --hypothesis-profile=quick -m "not slurm and not processes and not slow" $(ARGS)

# Old facts are named and break nothing: that time passes is no fault of a change.
lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m piper_hpc.config.facts

types: $(VENV)/test.stamp
	$(BIN)/mypy

# Every all-to-all against flat and MPI on the testbed's shaped links: under twenty minutes, as root, on a quiet machine.
bench-a2a: $(VENV)/test.stamp testbed-packages
	$(BIN)/python -m piper_hpc.studies.all_to_all $(ARGS)

# Our own runs on the testbed, predicted, trained and held against the bars: under forty minutes, as root, quiet machine.
validate-testbed: $(VENV)/test.stamp testbed-packages
	$(BIN)/python -m piper_hpc.studies.own_runs $(ARGS)

# The paper's claim side by side: what others do, what it does, what the planner finds: forty minutes, as root, quiet machine.
compare-strategies: $(VENV)/test.stamp testbed-packages
	$(BIN)/python -m piper_hpc.studies.headline $(ARGS)

# One layer beside transformers' and a dense product, in turn: two minutes, on a quiet machine; on a GPU where there is one.
bench-layer: $(VENV)/test.stamp
	$(BIN)/python -m piper_hpc.studies.layer_speed $(ARGS)

# What each part brings, alone and among all of them: under forty minutes, as root, on a quiet machine.
ablation: $(VENV)/test.stamp testbed-packages
	$(BIN)/python -m piper_hpc.studies.ablation $(ARGS)

# Real trainings on the testbed, hurt at random moments: sixty in under two hours, as root; interrupted, it goes on.
faults: $(VENV)/test.stamp testbed-packages
	$(BIN)/python -m piper_hpc.studies.faults $(ARGS)

# Debian's Slurm, munge, slurmdbd and MariaDB for the tests on a real Slurm. Without root they are skipped, with the reason.
testbed-packages:
	@sh piper_hpc/testbed/packages.sh || echo "the Slurm tests will be skipped"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { test "$$(id -u)" = 0 && apt-get update -q && \
	    apt-get install -q -y python3-venv; } || { echo "missing: python3-venv (apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# Another TORCH than last time is installed anew.
$(VENV)/torch.txt: FORCE | $(VENV)/bin/python
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

FORCE:

$(VENV)/run.stamp: pyproject.toml $(VENV)/torch.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[report]"
	touch $@

$(VENV)/test.stamp: pyproject.toml $(VENV)/run.stamp
	$(BIN)/python -m pip install --quiet --editable ".[report,test,wandb]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
