PYTHON ?= python3
TASK ?= demo_saliency
TASKS ?= demo_blur demo_shadow demo_mirror demo_saliency demo_semantic
SEEDS ?= 0 1 2
RUN = .venv/bin/python

.PHONY: demo test row seeds standin

demo: .venv/installed  ## install, run all four stages on the embedded default, print its table
	$(RUN) 01_cache_features.py
	$(RUN) 02_train_srm.py
	$(RUN) 03_train_agent.py
	$(RUN) 04_evaluate.py

row: .venv/installed  ## the four stages for one task: make row TASK=demo_shadow
	$(RUN) 01_cache_features.py TASK=$(TASK)
	$(RUN) 02_train_srm.py TASK=$(TASK)
	$(RUN) 03_train_agent.py TASK=$(TASK)
	$(RUN) 04_evaluate.py TASK=$(TASK)

seeds: .venv/installed  ## every demo task over three training seeds, and the table of their means
	for task in $(TASKS); do \
	  $(RUN) 01_cache_features.py TASK=$$task || exit 1; \
	  for seed in $(SEEDS); do \
	    set -- TASK=$$task RUN_DIR=runs/$$task-seed$$seed FEATURES=runs/$$task/features.h5 SEED=$$seed; \
	    $(RUN) 02_train_srm.py "$$@" && $(RUN) 03_train_agent.py "$$@" && $(RUN) 04_evaluate.py "$$@" || exit 1; \
	  done; \
	done
	$(RUN) -m common.summary $(foreach task,$(TASKS),$(foreach seed,$(SEEDS),runs/$(task)-seed$(seed)))

standin: .venv/installed  ## retrain the SAM and CLIP stand-ins from scratch: two hours on a CPU
	$(RUN) -m common.standin.train_sam
	$(RUN) -m common.standin.train_clip

test: .venv/installed  ## install, run the tests
	$(RUN) -m pytest -q tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@
