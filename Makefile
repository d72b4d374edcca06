# Each target sets up .venv by itself; all that it needs is Python >= 3.11 (to choose one: make PYTHON=/path/to/python3).

.PHONY: help demo test check bench clean
.DEFAULT_GOAL := help

BIN := .venv/bin
# Twice: with one, pip still prints warnings that concern nobody here. Errors are printed.
PIP_INSTALL := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install

help:
	@echo "make demo    the main job on real files, with nothing but Python installed"
	@echo "make test    all tests (PYTEST_ARGS=...); those of a server that is not installed are skipped"
	@echo "make check   lint, format, types and import contracts"
	@echo "make bench   benchmarks beside Celery with Redis (BENCH=packing, policies, claims, events, supervision or waiting: another one; BENCH_ARGS=...)"
	@echo "make clean   remove .venv, caches and benchmark results"

demo: .venv/.runtime
	@$(BIN)/aque demo

test: .venv/.development
	@$(BIN)/python -m pytest -n 6 --dist loadgroup $(PYTEST_ARGS)

check: .venv/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.development
	@$(BIN)/python -m benchmarks$(if $(BENCH),.$(BENCH)) $(BENCH_ARGS)

clean:
	rm -rf .venv .venv-peers .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis benchmarks/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps hold the directory in which .venv was made: its scripts name that directory and the Python that made them, so
# that a checkout that was moved, or whose Python was replaced, needs a new one.
ifneq ($(shell $(BIN)/python -c 'import pip' 2>/dev/null && cat .venv/.runtime 2>/dev/null),$(CURDIR))
.PHONY: .venv/.runtime
endif

.venv/.runtime: pyproject.toml
	@set -eu; \
	if $(BIN)/python -c 'import pip' 2>/dev/null && [ "$$(cat $@ 2>/dev/null || echo '$(CURDIR)')" = '$(CURDIR)' ]; then \
	    exit 0; \
	fi; \
	for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found-}" ]; then \
	    echo 'Aque needs Python 3.11 or newer and found none: install one, or name it: make PYTHON=/path/to/python3' >&2; \
	    exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found cannot make a virtual environment, its module ensurepip is not installed: apt install python3-venv" >&2; \
	    exit 1; \
	fi; \
	echo "making .venv with $$("$$found" --version)"; \
	"$$found" -m venv --clear .venv
	@echo 'installing Aque into .venv'
	@$(PIP_INSTALL) --editable .
	@echo '$(CURDIR)' >$@

.venv/.development: .venv/.runtime
	@echo 'installing the tools for development into .venv'
	@$(PIP_INSTALL) --editable '.[dev,redis,flower]'
	@touch $@
