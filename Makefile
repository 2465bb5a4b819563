# What a newcomer types. Every target makes its own virtual environment first and finds it made the
# next time; tools/setup/make_venv.sh is that step.
#
#   PYTHON=python3.12       the interpreter to build .venv with
#   TORCH_INDEX=URL|none    an index to take torch from, or none beyond what pip is configured with
#   PYTEST_ARGS='-k layout' passed on to pytest

VENV_PYTHON = .venv/bin/python
export PYTHON TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

quickstart: ## train a small phi-1 on this machine, from source code to completions
	@sh tools/setup/make_venv.sh
	@$(VENV_PYTHON) -m phi1_megatron quickstart

test: ## run the tests
	@sh tools/setup/make_venv.sh dev
	@$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

check: ## lint, formatting and types: what CI asks of a change
	@sh tools/setup/make_venv.sh dev
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

format: ## let ruff format the code and mend what it can
	@sh tools/setup/make_venv.sh dev
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

clean: ## remove build products and caches (not .venv, and never runs/)
	rm -rf build dist phi1_megatron.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find phi1_megatron tests tools -type d -name __pycache__ -prune -exec rm -rf {} +
