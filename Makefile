# Every target makes the virtual environment and installs what it needs by itself; after that, pip
# runs again only when pyproject.toml or constraints.txt has changed.
#
#   PYTHON=python3.12      the interpreter to build the environment from (3.11 to 3.13)
#   VENV=.venv             where the environment lives
#   PIP_ARGS='...'         more options for pip install, e.g. the index of PyTorch's CPU builds
#   DEMO_ARGS, PYTEST_ARGS, BENCH_ARGS   passed on to the command

VENV        ?= .venv
PIP_ARGS    ?=
DEMO_ARGS   ?=
BENCH_ARGS  ?=
PYTEST_ARGS ?=
# Test processes, and torch threads in each. The tensors are small, and where other work shares the
# cores, a second thread has made the steps several times slower.
WORKERS     ?= 2
THREADS     ?= 1

PY := $(VENV)/bin/python
SUPPORTED := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

# The first interpreter on PATH that runs and is supported: a launcher may exist and still fail.
PYTHON ?= $(shell IFS=:; for name in python3.13 python3.12 python3.11 python3; do \
	for dir in $$PATH; do \
		if [ -x "$$dir/$$name" ] && "$$dir/$$name" -c '$(SUPPORTED)' >/dev/null 2>&1; then \
			echo "$$dir/$$name"; exit; \
		fi; \
	done; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # all targets share one environment, and two pips in it would collide
.PHONY: help demo test test-slow test-compiled lint format docs bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed-demo ## run the demonstration; it writes to pvi-demo/
	OMP_NUM_THREADS=$(THREADS) $(VENV)/bin/pvi demo $(DEMO_ARGS)

test: lint ## lint, check types and run the fast tests
	OMP_NUM_THREADS=$(THREADS) $(PY) -m pytest -q -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test ## run the tests marked slow
	OMP_NUM_THREADS=$(THREADS) $(PY) -m pytest -q -n $(WORKERS) --dist loadfile -m slow $(PYTEST_ARGS)

test-compiled: $(VENV)/.installed-test ## run the fast tests with every fit's steps captured
	OMP_NUM_THREADS=$(THREADS) $(PY) -m pytest -q -n $(WORKERS) --dist loadfile --compile graph $(PYTEST_ARGS)

lint: $(VENV)/.installed-test ## ruff, its formatter in check mode, and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/.installed-test ## apply ruff's fixes and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.installed-docs ## build the documentation, warnings as errors
	$(PY) -m sphinx -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

bench: $(VENV)/.installed-bench ## run the benchmarks
	$(PY) -m benchmarks $(BENCH_ARGS)

clean: ## remove what the other targets built, but not the environment
	rm -rf build dist docs/_build pvi-demo .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path './$(VENV)' -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove the environment as well
	rm -rf $(VENV)

$(VENV)/.created:
	@if ! { [ -x $(PY) ] && $(PY) -c '$(SUPPORTED)' && $(PY) -m pip --version; } >/dev/null 2>&1; then \
		python='$(PYTHON)'; \
		if ! "$$python" -c '$(SUPPORTED)' >/dev/null 2>&1; then \
			echo "pvi needs Python 3.11, 3.12 or 3.13 with venv; say which: make PYTHON=/path/to/python" >&2; \
			exit 1; \
		fi; \
		clear=; if [ -e $(VENV)/pyvenv.cfg ]; then clear=--clear; fi; \
		echo "making $(VENV) with $$python"; \
		"$$python" -m venv $$clear $(VENV); \
	fi
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	@touch $@
