# `make repro` and `make test` do all the set-up on a machine with Python 3.11, git and make.
PYTHON ?= python3.11
# DVC runs the stages with the first `python` on PATH, so the environment has to come first.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/ready

.PHONY: repro test gpu-check setup
repro: setup
	dvc repro
	@dvc metrics show metrics/accuracy.json
	@echo "Metrics:         metrics/*.json         (dvc metrics show, dvc metrics diff)"
	@echo "Contact sheets:  results/audit/contact_sheets/   real and generated, side by side"
	@echo "Plots:           dvc plots show --open"
	@echo "Classifier:      results/export/      with its model card, README.md"
	@echo "On your photos:  bob predict PHOTO..."

test: setup
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	pytest

# What only a GPU can show, in some eight minutes; the figures go to bench/results/.
gpu-check: setup
	python -m bench.gpu

setup: $(READY)

# One stamp: the installation runs again only when what is to be installed has changed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
