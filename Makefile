# Every target makes .venv and installs what is missing or changed first; nothing else is needed.
#   make PYTHON=/path/to/python3.11 demo    another Python for .venv (3.11 or newer)
#   make test ARGS="-k transitions"         more arguments for the program behind a target

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
RUN := .venv/bin/python

.PHONY: help environment demo test lint toy-checkpoints clean

help:
	@echo "make demo             train the toy generator on the CaC reward; report in runs/demo/"
	@echo "make test             every test (CPU, no network)"
	@echo "make lint             ruff check, ruff format --check, mypy"
	@echo "make toy-checkpoints  train the checkpoints of the toy world anew (hours on a CPU)"
	@echo "make clean            remove caches and build products; keeps .venv, runs/, checkpoints"

environment:
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) was not found; name a Python with: make PYTHON=/path/to/python3.11 ..."; \
		exit 1; }
	@$(PYTHON) .ci/install.py

demo: environment
	$(RUN) -m examples.toy_world.demo $(ARGS)

# One thread a worker: two workers with a thread pool each would fight over two cores.
# pytest exits with 5, and make with 2, when no test ran.
test: environment
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile \
		--fail-on-skipped-file $(ARGS)

lint: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

toy-checkpoints: environment
	$(RUN) -m examples.toy_world.make_checkpoints $(ARGS)

clean:
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	@echo "kept: .venv, runs/ and the checkpoints; remove those by hand if you mean to"
