# `make` alone lists the targets. Each makes .venv first, where there is none yet.
# PYTHON picks another interpreter: make test PYTHON=python3.12
.DEFAULT_GOAL := help
.PHONY: help test lint demo bench sanitize clean venv

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c "$(SUPPORTED)" 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin/python

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: lint  ## check style and types, then run the tests (CPU: through Triton's interpreter)
	$(RUN) -m pytest -n logical --durations=15

lint: venv  ## check style and the types of the public surface
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

demo: venv  ## train a small Llama twice, unpatched and patched, and compare; writes demo/
	$(RUN) -m liger_fn train --out demo

bench: venv  ## measure every op against its peers (needs a GPU)
	$(RUN) -m benchmarks

sanitize: venv  ## run every op under compute-sanitizer (needs a GPU and the CUDA toolkit)
	$(RUN) -m liger_fn.testing.sanitize

clean:  ## remove .venv, caches and what the demo wrote
	rm -rf .venv demo sanitize build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv:
	@"$(PYTHON)" -c "$(SUPPORTED)" 2>/dev/null || \
		{ echo "liger_fn needs Python 3.11, 3.12 or 3.13; got PYTHON='$(PYTHON)'"; exit 1; }
	@"$(PYTHON)" tools/bootstrap.py
