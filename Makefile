PYTHON ?= python3
TASK ?= demo_saliency
STAGE1 ?=
STAGE2 ?=
PROMPT ?=
MASKS ?=
DATA_DIR ?=
TASKS ?= demo_blur demo_shadow demo_mirror demo_saliency demo_semantic
SEEDS ?= 0
FIGURE7 ?= 0
SAM ?= vit_b
DEVICE ?= auto
RUN = .venv/bin/python
# for the tests; the programs set it themselves, see common/runtime/first.py
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test row tables seeds bench faults standin help
# NAME=text as one word for the shell, whatever it holds; nothing where it is empty
quoted = $(if $($1),'$1=$(subst ','\'',$($1))')

demo: .venv/installed  ## install, run all four stages on demo_saliency, print its table
	$(RUN) 01_cache_features.py
	$(RUN) 02_train_srm.py
	$(RUN) 03_train_agent.py
	$(RUN) 04_evaluate.py

row: .venv/installed  ## the four stages for one task: make row TASK=duts STAGE1="SAM=vit_h CLIP=ViT-B-16-quickgelu/openai" [STAGE2=BRANCH=implicit PROMPT="a text" DATA_DIR=folder]
	$(RUN) 01_cache_features.py TASK=$(TASK) DEVICE=$(DEVICE) $(call quoted,PROMPT) $(call quoted,DATA_DIR) $(STAGE1)
	$(RUN) 02_train_srm.py TASK=$(TASK) DEVICE=$(DEVICE) $(STAGE2)
	$(RUN) 03_train_agent.py TASK=$(TASK) DEVICE=$(DEVICE)
	$(RUN) 04_evaluate.py TASK=$(TASK) DEVICE=$(DEVICE)

tables: .venv/installed  ## every table of the paper for one task: make tables TASK=demo_shadow SEEDS=0,1,2 FIGURE7=1 [MASKS=SEEM:folder]
	$(RUN) -m common.results.tables TASK=$(TASK) SEEDS=$(SEEDS) FIGURE7=$(FIGURE7) DEVICE=$(DEVICE) $(call quoted,MASKS) $(call quoted,DATA_DIR)

seeds: .venv/installed  ## AlignSAM and the rows beside it on every demo task, three training seeds each
	for task in $(TASKS); do \
		$(RUN) -m common.results.tables TASK=$$task SEEDS=0,1,2 EXPERIMENTS=main,rivals DEVICE=$(DEVICE) || exit 1; done

bench: .venv/installed  ## how fast the parts are beside what they replace: make bench SAM=mobile_sam DEVICE=cuda
	$(RUN) -m common.results.bench SAM=$(SAM) DEVICE=$(DEVICE)

faults: .venv/installed  ## kill stages, fill disks and damage files at random: a few minutes
	$(RUN) -m tests.faults.campaign KILLS=200 INPUTS=1000

standin: .venv/installed  ## retrain the SAM and CLIP stand-ins from scratch: four to eight hours on two CPU cores
	$(RUN) -m common.standin.training.train_sam
	$(RUN) -m common.standin.training.train_clip

test: .venv/installed  ## install, run the tests
	$(RUN) -m pytest -q tests

help:  ## these lines
	@sed -n 's/^\([a-z]*\):.*  ## /\1: /p' Makefile

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@
