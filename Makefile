# The two commands of the README are `make quickstart` and `make test`; each makes the environment if it is missing.
VENV := .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

TESTS := $(RUN) -m pytest --numprocesses=auto --maxprocesses=4
# What makes torch compute as it does on other processors.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
SSE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE

# Two runs at a time, one thread each: on two cores this is faster than one run on both.
SEEDS := 0,1,2
SWEEP := OMP_NUM_THREADS=1 $(RUN) -m cl_bench -m hydra/launcher=joblib hydra.launcher.n_jobs=2 +scale=mini seed=$(SEEDS) logger=none
RESNET18 := $(foreach method,finetune er derpp joint icarl lwf ewc,resnet18_$(method)_cifar100_10split)
MINI := $(RESNET18) $(foreach net,lvt den apd memory_vit vit_er,$(net)_cifar100_10split) dytox_cifar100_10step
LVT_PARTS := inter_task injection_head accumulation_head confidence
FAMILY := vit deepvit navit cvt cct efficientvit mobilevit mobilevitv2 levit coat
DETECTORS := $(foreach method,finetune replay pseudo_labels pseudo_labels_released joint,detr_shapes_$(method))
DYTOX_PARTS := token_expansion divergence_head finetuning independent_classifiers
# One frozen trunk for every row: all images of the first 50 classes, which are in no task.
PRETRAINED := results/mini/pretrained
OPEN := results/mini/memory_vit_open
ON_HALF := scenario.pretrain_classes=50 backbone.model=small backbone.checkpoint=$(PRETRAINED)/trunk.pt
MEMORY := $(ON_HALF) +experiment=memory_vit_cifar100_10split
LAST := trainer.evaluate_after=last_task
# a b c -> a,b,c
, := ,
space := $(subst ,, )
listed = $(subst $(space),$(,),$(strip $(1)))

.PHONY: help environment quickstart test test-fast test-portable test-avx2 test-sse lint types check format avalanche bench mini detection mini_backbones two_tasks mini_pretrained mini_memory ablation_lvt ablation_dytox docs first_hour soak golden clean

help: ## list the targets
	@grep -E '^[a-z0-9_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

environment: $(VENV)/.made ## python's venv with everything pinned in constraints.txt

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python --constraint constraints.txt --editable '.[dev,docs]'
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

check: lint types test docs ## everything that CI checks

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
	$(RUN) scripts/compare.py results/detection/records --metrics AP_all,AP_old,AP_new,AP50_all --out results/detection

mini_backbones: $(VENV)/.made ## ER, fine-tuning and joint training on each network of the ViT family: six core-hours; SEEDS=0 is a third
	$(SWEEP) results_dir=results/mini/backbones/records +experiment=vit_family_cifar100_10split backbone=$(call listed,$(FAMILY))
	$(SWEEP) results_dir=results/mini/backbones/records +experiment=vit_family_cifar100_10split backbone=$(call listed,$(FAMILY)) method=finetune,joint buffer=none
	$(RUN) scripts/compare.py results/mini/backbones/records --out results/mini/backbones
	$(RUN) scripts/backbones.py --scale mini --only $(call listed,$(FAMILY)) --records results/mini/backbones/records --out results/backbones/mini

two_tasks: $(VENV)/.made ## ER on two tasks of CIFAR-100 with each network of the ViT family, in fp32 and bf16: results/backbones/two_tasks
	$(SWEEP) results_dir=results/backbones/two_tasks/records +experiment=vit_family_cifar100_10split scenario.pretrain_classes=80 scenario.num_tasks=2 report=false backbone=$(call listed,$(FAMILY)) precision=fp32,bf16
	$(RUN) scripts/compare.py results/backbones/two_tasks/records --group backbone --metrics class_il.average_accuracy,task_il.average_accuracy,task_il.learning_accuracy --out results/backbones/two_tasks

$(PRETRAINED)/trunk.pt: $(VENV)/.made
	OMP_NUM_THREADS=1 $(RUN) -m cl_bench +scale=mini +experiment=memory_vit_cifar100_10split name=trunk results_dir=$(PRETRAINED)/trunk/records scenario.pretrain_classes=50 scenario.num_tasks=1 scenario.train_per_class=500 scenario.test_per_class=100 method.warm_up=half method.warm_up_epochs=16 trainer.batch_size=128 trainer.epochs=2 backbone.memory=0 backbone.class_token=false trainer.keep_tasks=true
	cp $(PRETRAINED)/trunk/records/*/*/seed0/checkpoint/task00.pt $@

mini_pretrained: $(VENV)/.made $(PRETRAINED)/trunk.pt ## class means, RanPAC, SLCA, prompts and memory tokens on one network: results/mini/pretrained
	$(SWEEP) results_dir=$(PRETRAINED)/records $(ON_HALF) +experiment=simplecil_cifar100_10split,ranpac_cifar100_10split,l2p_cifar100_10split,dualprompt_cifar100_10split,coda_prompt_cifar100_10split,slca_cifar100_10split
	$(SWEEP) results_dir=$(PRETRAINED)/records $(ON_HALF) +experiment=slca_cifar100_10split name=slca-unaligned method.alignment=false
	for method in l2p dualprompt coda_prompt; do $(SWEEP) results_dir=$(PRETRAINED)/records $(ON_HALF) +experiment=$${method}_cifar100_10split name=$$method-off method.prompts=false; done
	for method in l2p coda_prompt; do $(SWEEP) results_dir=$(PRETRAINED)/records $(ON_HALF) +experiment=$${method}_cifar100_10split name=$$method-unmasked method.loss_classes=seen; done
	$(SWEEP) results_dir=$(PRETRAINED)/records $(MEMORY) name=head backbone.memory=0 backbone.class_token=false
	$(SWEEP) results_dir=$(PRETRAINED)/records $(MEMORY) name=memory-5
	$(RUN) scripts/compare.py $(PRETRAINED)/records --out $(PRETRAINED)

mini_memory: mini_pretrained ## what memory tokens gain from cells, top-k reads, extension and rehearsal: results/mini/memory_vit_open
	for m in 1 2 10 20; do $(SWEEP) results_dir=$(OPEN)/records/cells $(MEMORY) $(LAST) name=memory-$$m backbone.memory=$$m; done
	for k in 1 2; do $(SWEEP) results_dir=$(OPEN)/records/reads $(MEMORY) $(LAST) name=reads-$$k backbone.reads=$$k; done
	$(SWEEP) results_dir=$(OPEN)/records/attention $(MEMORY) $(LAST) name=concatenation backbone.attention=concatenation
	for what in new all; do $(SWEEP) results_dir=$(OPEN)/records/rehearsal $(MEMORY) $(LAST) name=$$what buffer=reservoir buffer.capacity=100 method.rehearsal=$$what; done
	for part in cells reads attention rehearsal; do $(RUN) scripts/compare.py $(PRETRAINED)/records/memory_vit_cifar100_10split $(OPEN)/records/$$part --out $(OPEN)/$$part; done
	$(RUN) scripts/plot_memory.py

ablation_lvt: $(VENV)/.made ## LVT without one part each at mini scale, beside the complete LVT of make mini
	$(SWEEP) results_dir=results/mini/$@/records +experiment=lvt_cifar100_10split +ablation=$(call listed,$(addprefix lvt_without_,$(LVT_PARTS)))
	$(RUN) scripts/compare.py results/mini/records/lvt_cifar100_10split results/mini/$@/records --out results/mini/$@

ablation_dytox: $(VENV)/.made ## the same for DyTox
	$(SWEEP) results_dir=results/mini/$@/records +experiment=dytox_cifar100_10step +ablation=$(call listed,$(addprefix dytox_without_,$(DYTOX_PARTS)))
	$(RUN) scripts/compare.py results/mini/records/dytox_cifar100_10step results/mini/$@/records --out results/mini/$@

docs: $(VENV)/.made ## the documentation as a site: site/index.html
	OMP_NUM_THREADS=1 $(RUN) -m sphinx --fail-on-warning --keep-going --quiet --jobs auto docs site

first_hour: $(VENV)/.made ## what a newcomer does in the first hour, in minutes; the transcript is docs/first_hour.md
	$(RUN) examples/first_hour.py --page docs/first_hour.md

soak: $(VENV)/.made ## 220 kills over every method, loggers, sweeps, a full disk, 200 tasks, a long fuzz: an hour or so
	OMP_NUM_THREADS=1 $(RUN) -u tests/soak.py --kills 220 --more --json soak.json
	CL_BENCH_FUZZ=1000 OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_fuzz.py --timeout=0

golden: $(VENV)/.made ## make the golden runs of the tests again, if results were meant to change
	OMP_NUM_THREADS=1 $(RUN) tests/test_golden.py

clean: ## remove the environment and caches, never data or results
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
