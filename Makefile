# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/.runtime-installed
DEV := .venv/.dev-installed
DEMO := runs/demo

.PHONY: demo test test-slow check bench clean

$(RUNTIME): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version) is too old. Name a newer one: make PYTHON=python3.12 ..."; exit 2; }
	@echo "Installing into .venv (torch is large; this takes minutes only the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(DEV): $(RUNTIME)
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(RUNTIME)  ## train Pong on the real game, evaluate, film; continues where it was stopped
	@$(BIN)/lab train configs/rl/pong_cpu.yaml --out $(DEMO) $$(test -f $(DEMO)/run.json && echo --resume)
	@echo
	@$(BIN)/lab evaluate $(DEMO) --episodes 10 --seed 20000
	@echo
	@$(BIN)/lab play $(DEMO) --seed 20000
	@echo "curve   $(DEMO)/media/learning_curve.png"
	@echo "resume: make demo   play: $(BIN)/lab play $(DEMO)   W&B: $(BIN)/lab sync $(DEMO)"

check: $(DEV)  ## what CI runs before the tests: lint, format, import contract, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/pyright

test: check  ## everything but the tests that train for minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist=loadfile --no-loadscope-reorder \
		--numprocesses=$$($(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')

test-slow: $(DEV)  ## the tests that train for minutes
	@$(BIN)/python -m pytest -m slow --timeout=0

bench: $(DEV)  ## side by side with Stable-Baselines3, results in benchmarks/results/
	@$(BIN)/python -m benchmarks.dqn_vs_sb3

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
