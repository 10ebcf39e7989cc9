# The two commands of the README are `make quickstart` and `make test`; each makes the environment when it is missing.
VENV := .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

MINI := +experiment=lvt_cifar100_10split,resnet18_finetune_cifar100_10split,resnet18_er_cifar100_10split,resnet18_derpp_cifar100_10split,resnet18_joint_cifar100_10split

.PHONY: help environment quickstart test lint types check format bench mini soak golden clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

environment: $(VENV)/.made ## python's venv with everything pinned in constraints.txt

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.made ## a small LVT on the bundled digits: accuracy table and report, under a minute
	$(RUN) -m cl_bench +experiment=quickstart

test: $(VENV)/.made ## all tests
	$(RUN) -m pytest --numprocesses=auto --maxprocesses=4

lint: $(VENV)/.made ## ruff: format and lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/.made ## mypy
	$(VENV)/bin/mypy

check: lint types test ## everything CI asks for

format: $(VENV)/.made ## let ruff mend what it can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/.made ## speed of loop, data path and buffer as ratios
	$(RUN) scripts/benchmark.py

mini: $(VENV)/.made ## the table in results/mini: fifteen runs of about two minutes
	$(RUN) -m cl_bench -m $(MINI) +scale=mini seed=0,1,2 results_dir=results/mini/records
	$(RUN) scripts/compare.py results/mini/records --out results/mini

soak: $(VENV)/.made ## 220 kills over every method, loggers, a full disk, 200 tasks, a long fuzz: an hour or so
	OMP_NUM_THREADS=1 $(RUN) -u tests/soak.py --kills 220 --more --json soak.json
	CL_BENCH_FUZZ=1000 OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_fuzz.py --timeout=0

golden: $(VENV)/.made ## make the golden runs of the tests anew, where results were meant to change
	OMP_NUM_THREADS=1 $(RUN) tests/test_golden.py

clean: ## remove the environment and caches, never data or results
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
