# Every target does its own set-up: virtual environments in .venv and .venv-core, and for those that need a
# server a real SGLang in .sglang-cpu (or $STREAMSYN_SGLANG_HOME). All are made once; the second time costs nothing.

PYTHON ?= python3
BIN := .venv/bin
# Three files of tests at a time, longest first: on two cores a third keeps them busy while others wait for a process.
AT_A_TIME := -n 3 --dist loadfile --no-loadscope-reorder
# A test that fails is run once more, alone, and counts if it fails again, as in CPython's CI. Thousands of tests
# with processes and signals on a busy machine sometimes meet a late clock; those that passed then are named.
once_more = || { [ $$? = 1 ] && printf '\n--- what failed, once more and alone ---\n' && \
	  $(BIN)/pytest -n 0 --last-failed --last-failed-no-failures=none -rp $(1); }
# Property tests are not tried in short if `test-crash`, which tries them at length, is asked for too.
HERMETIC := not crash and not torture and not real_sglang and not ray and not chromium \
  $(if $(filter test-all test-crash,$(MAKECMDGOALS)),and not hypothesis)
# The files with tests of `test-crash`: to collect the others, too, takes each worker four seconds.
CRASH_FILES = $(shell grep -rlE 'crash|@given|RuleBasedStateMachine|@examples' tests --include='test_*.py')

# Byte code is kept, also where the environment says otherwise: each worker, command and later target would
# compile anew what it imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-all test-crash test-real test-browser torture torture-ray coverage lint check-deploy bench bench-real clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

demo:  ## the main job on a real SGLang with a packaged model
	@$(MAKE) --no-print-directory -j2 .venv-core/stamp sglang
	.venv-core/bin/streamsyn demo

test: .venv/bytecode  ## all tests but those below: no real server, no browser, no kills and resumes
	$(BIN)/pytest $(AT_A_TIME) -m "$(HERMETIC)" $(if $(COVERAGE),--cov --cov-report=term) \
	$(call once_more,-m "$(HERMETIC)")

test-crash: .venv/bytecode  ## kills, signals and resumes; property tests at length; asyncio in debug mode
	$(BIN)/pytest $(CRASH_FILES) $(AT_A_TIME) \
	  -m "(crash or hypothesis) and not torture and not real_sglang and not ray and not chromium" \
	  --hypothesis-profile=long -o asyncio_debug=true \
	$(call once_more,--hypothesis-profile=long -o asyncio_debug=true)

test-real: .venv/bytecode sglang  ## tests against a real SGLang: one server for all, one that a run launches; and raylets
	$(BIN)/pytest tests/real tests/cluster -n 3 --dist loadscope -m "(real_sglang or ray) and not torture" \
	$(call once_more,-m "(real_sglang or ray) and not torture")

test-browser: .venv/stamp chromium  ## the report and the page of the daemon in a browser
	$(BIN)/pytest tests/report tests/daemon/test_page.py -m chromium $(call once_more,-m chromium)

test-all: test test-crash test-browser test-real  ## all four

torture: .venv/stamp  ## every crash state of small runs, many kills (STREAMSYN_KILLS, STREAMSYN_KILLS_SEED), all examples of property tests
	$(BIN)/python -m tests.system.crash_states
	$(BIN)/pytest $(AT_A_TIME) -m "hypothesis and not real_sglang and not ray and not chromium" --hypothesis-profile=torture -o timeout=1800
	STREAMSYN_KILLS=$${STREAMSYN_KILLS:-50} $(BIN)/pytest -m "(crash or torture) and not ray" -o timeout=1800

torture-ray: .venv/stamp sglang  ## raylets: STREAMSYN_KILLS nodes killed in one run, others cut off, a real SGLang placed; prints figures
	$(BIN)/pytest tests/cluster -m "ray and torture" -s

coverage:  ## `make test` with line and branch coverage; fails below the floor in pyproject.toml
	@$(MAKE) --no-print-directory test COVERAGE=1

lint: .venv/stamp  ## formatting, ruff, mypy, the direction of imports; examples by pyright, too
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python tests/library/examples

check-deploy: .venv/stamp  ## deploy/ by hadolint, promtool, shellcheck, kubectl and others; CRDS=FOLDER of their definitions
	PYTHON=$(BIN)/python deploy/check.sh $(CRDS)

bench: .venv/stamp  ## overhead, memory, resume and a simulated fleet, beside baselines of the same run
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.resume
	$(BIN)/python -m benchmarks.fleet
	$(BIN)/python -m benchmarks.fleet faulty
	$(BIN)/python -m benchmarks.assembly
	$(BIN)/python -m benchmarks.export

bench-real: .venv/stamp sglang  ## beside other software: a router, datatrove and others, bench_serving; over an hour
	$(BIN)/python -m benchmarks.prefix
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.real throughput
	$(BIN)/python -m benchmarks.real sections

clean:  ## remove what the other targets made
	rm -rf .venv .venv-core .sglang-cpu .peers .deploy-tools .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache .coverage

# For development: torch and all that tests and benchmarks need.
.venv/stamp: pyproject.toml deploy/constraints.txt
	PYTHON=$(PYTHON) deploy/venv.sh .venv '[dev]'
	touch $@

# Byte code of the tests and of all that they import, made once, before several workers need it at the same time.
.venv/bytecode: .venv/stamp
	-@$(BIN)/pytest --collect-only -qq >/dev/null  # what cannot be imported is told when it is tested
	touch $@

# For the demo: the core alone, without torch.
.venv-core/stamp: pyproject.toml deploy/constraints.txt
	PYTHON=$(PYTHON) deploy/venv.sh .venv-core
	touch $@

.PHONY: sglang chromium
sglang:
	deploy/sglang-cpu/install.sh

chromium:
	deploy/chromium/install.sh
