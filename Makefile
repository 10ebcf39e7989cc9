# The two commands of the README are `make quickstart` and `make test`; each makes the environment if it is missing.
VENV := .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

TESTS := $(RUN) -m pytest --numprocesses=auto --maxprocesses=4
# What makes torch compute as it does on other processors.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
SSE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE

# Two runs at a time, one thread each: on two cores this is faster than one run on both.
SWEEP := OMP_NUM_THREADS=1 $(RUN) -m cl_bench -m hydra/launcher=joblib hydra.launcher.n_jobs=2 +scale=mini seed=0,1,2 logger=none
RESNET18 := $(foreach method,finetune er derpp joint icarl lwf ewc,resnet18_$(method)_cifar100_10split)
MINI := $(RESNET18) $(foreach net,lvt den apd memory_vit vit_er,$(net)_cifar100_10split) dytox_cifar100_10step
LVT_PARTS := inter_task injection_head accumulation_head confidence
FAMILY := vit deepvit navit cvt cct efficientvit mobilevit mobilevitv2 levit coat
DETECTORS := $(foreach method,finetune replay pseudo_labels pseudo_labels_released joint,detr_shapes_$(method))
DYTOX_PARTS := token_expansion divergence_head finetuning independent_classifiers
# a b c -> a,b,c
, := ,
space := $(subst ,, )
listed = $(subst $(space),$(,),$(strip $(1)))

.PHONY: help environment quickstart test test-fast test-portable test-avx2 test-sse lint types check format avalanche bench mini detection mini_backbones ablation_lvt ablation_dytox soak golden clean

help: ## list the targets
	@grep -E '^[a-z0-9_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

environment: $(VENV)/.made ## python's venv with everything pinned in constraints.txt

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.made ## a small LVT on the bundled digits: accuracy table and report, under a minute
	$(RUN) -m cl_bench +experiment=quickstart

test: $(VENV)/.made ## all tests
	$(TESTS)

test-fast: $(VENV)/.made ## the tests that take less than half a second each: under a minute
	$(TESTS) -m 'not slow'

test-portable: $(VENV)/.made ## all tests; those that rounding can change also as on other processors, and with two threads
	$(TESTS)
	CL_BENCH_TEST_THREADS=2 $(TESTS) -m arithmetic
	$(MAKE) test-avx2 test-sse

test-avx2: $(VENV)/.made ## the tests that rounding can change, computed as on a processor with AVX2 only
	$(AVX2) $(TESTS) -m arithmetic

test-sse: $(VENV)/.made ## the same without AVX
	$(SSE) $(TESTS) -m arithmetic

lint: $(VENV)/.made ## ruff: format and lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/.made ## mypy
	$(VENV)/bin/mypy

check: lint types test ## everything that CI checks

format: $(VENV)/.made ## let ruff fix what it can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

avalanche: $(VENV)/.made ## our methods and Avalanche's on the same tasks: results/avalanche, ten minutes
	$(RUN) scripts/compare_avalanche.py

bench: $(VENV)/.made ## speed against the limit, Avalanche and pieces, as ratios: results/benchmark, ten minutes
	$(RUN) scripts/benchmark.py --out results/benchmark

mini: $(VENV)/.made ## the table in results/mini: three seeds of every method, about an hour and a half
	$(SWEEP) results_dir=results/mini/records +experiment=$(call listed,$(MINI))
	$(SWEEP) results_dir=results/mini/records +experiment=vit_er_cifar100_10split method=finetune,joint buffer=none
	$(SWEEP) results_dir=results/mini/records +experiment=supsup_cifar100_20split scenario.num_tasks=10
	$(RUN) scripts/compare.py results/mini/records --out results/mini

detection: $(VENV)/.made ## the table in results/detection: three seeds of each detector, about half an hour
	OMP_NUM_THREADS=1 $(RUN) -m cl_bench -m hydra/launcher=joblib hydra.launcher.n_jobs=2 seed=0,1,2 logger=none results_dir=results/detection/records +experiment=$(call listed,$(DETECTORS))
	$(RUN) scripts/compare.py results/detection/records --metrics AP_all,AP_old,AP_new,AP50_all,train_seconds --out results/detection

mini_backbones: $(VENV)/.made ## ER, fine-tuning and joint training on each network of the ViT family at mini scale
	$(SWEEP) results_dir=results/mini/backbones/records +experiment=vit_family_cifar100_10split backbone=$(call listed,$(FAMILY))
	$(SWEEP) results_dir=results/mini/backbones/records +experiment=vit_family_cifar100_10split backbone=$(call listed,$(FAMILY)) method=finetune,joint buffer=none
	$(RUN) scripts/compare.py results/mini/backbones/records --out results/mini/backbones
	$(RUN) scripts/backbones.py --scale mini --records results/mini/backbones/records --out results/backbones/mini

ablation_lvt: $(VENV)/.made ## LVT without one part each at mini scale, beside the complete LVT of make mini
	$(SWEEP) results_dir=results/mini/$@/records +experiment=lvt_cifar100_10split +ablation=$(call listed,$(addprefix lvt_without_,$(LVT_PARTS)))
	$(RUN) scripts/compare.py results/mini/records/lvt_cifar100_10split results/mini/$@/records --out results/mini/$@

ablation_dytox: $(VENV)/.made ## the same for DyTox
	$(SWEEP) results_dir=results/mini/$@/records +experiment=dytox_cifar100_10step +ablation=$(call listed,$(addprefix dytox_without_,$(DYTOX_PARTS)))
	$(RUN) scripts/compare.py results/mini/records/dytox_cifar100_10step results/mini/$@/records --out results/mini/$@

soak: $(VENV)/.made ## 220 kills over every method, loggers, sweeps, a full disk, 200 tasks, a long fuzz: an hour or so
	OMP_NUM_THREADS=1 $(RUN) -u tests/soak.py --kills 220 --more --json soak.json
	CL_BENCH_FUZZ=1000 OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_fuzz.py --timeout=0

golden: $(VENV)/.made ## make the golden runs of the tests again, if results were meant to change
	OMP_NUM_THREADS=1 $(RUN) tests/test_golden.py

clean: ## remove the environment and caches, never data or results
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
