# Every target does its own set-up: a virtual environment in .venv, and for those that need a server a real
# SGLang in .sglang-cpu (or $STREAMSYN_SGLANG_HOME). Both are made once; the second time costs nothing.

PYTHON ?= python3
BIN := .venv/bin
# Two files of tests at a time, in their order: those with most tests first leaves the slowest for the end. A
# real server without a GPU needs both cores for itself.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-quick test-zero3 lint bench bench-real clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

demo: .venv/stamp sglang  ## the main job on a real SGLang with a packaged model
	$(BIN)/streamsyn demo

test: .venv/stamp sglang chromium  ## all tests, those against the real SGLang and in a browser among them
	$(BIN)/pytest $(TWO) -m "not real_sglang"
	$(BIN)/pytest -m real_sglang

test-quick: .venv/stamp  ## all tests that need neither SGLang nor a browser
	$(BIN)/pytest $(TWO) -m "not real_sglang and not chromium"

test-zero3: .venv/stamp  ## training by ZeRO-3, on the CPU; installs DeepSpeed, which compiles by g++
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c deploy/constraints.txt deepspeed
	$(BIN)/pytest tests/trainer/test_two_ranks.py -k zero3

lint: .venv/stamp  ## formatting, ruff, mypy, the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/stamp  ## overhead, memory, resume and a simulated fleet, beside baselines of the same run
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.resume
	$(BIN)/python -m benchmarks.fleet
	$(BIN)/python -m benchmarks.assembly
	$(BIN)/python -m benchmarks.export

bench-real: .venv/stamp sglang router  ## beside real software: sglang-router, bench_serving; takes over an hour
	$(BIN)/python -m benchmarks.prefix
	$(BIN)/python -m benchmarks.real throughput
	$(BIN)/python -m benchmarks.real sections

clean:  ## remove what the other targets made
	rm -rf .venv .sglang-cpu .sglang-router .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/stamp: pyproject.toml deploy/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streamsyn needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e '.[dev]'
	touch $@

.PHONY: sglang router chromium
sglang:
	deploy/sglang-cpu/install.sh

router:
	deploy/sglang-router/install.sh

chromium:
	deploy/chromium/install.sh
