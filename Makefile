# `make help` lists the targets. Everything is installed into .venv; choose the interpreter with PYTHON=...
# The default is the first Python 3.11-3.13 on the PATH that can make a virtual environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo "$$p" && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## */  make \1\t/p' Makefile

demo: $(INSTALLED)  ## fine-tune the embedded pipeline end to end
	@rm -rf demo-output
	@$(BIN)/rewardsr demo

test: $(INSTALLED)  ## run the tests, a file at a time on each core
	@$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: $(INSTALLED)  ## lint, formatting, types
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "run '$(BIN)/ruff format'; this would change:"; $(BIN)/ruff format --check; exit 1; }
	@# mypy finds modules by folder alone and cannot know that adapters/ is rewardsr.adapters: show it the
	@# package as it is installed, as links in a folder of its own.
	@rm -rf .mypy && mkdir -p .mypy/rewardsr && cd .mypy/rewardsr && ln -s ../../rewardsr/* ../../adapters .
	@found=$$($(BIN)/mypy --no-error-summary) || { \
	  printf '%s\n' "$$found" | sed -e 's#^\.mypy/rewardsr/adapters/#adapters/#' -e 's#^\.mypy/##'; exit 1; }

clean:  ## remove caches, builds and the environment
	rm -rf .venv .mypy .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { \
	  echo "No Python 3.11, 3.12 or 3.13 with the venv module found: install one or name it, make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing into .venv (a few GB the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]' --constraint constraints.txt
	@touch $@
