PYTHON ?= python3
TASK ?= demo_saliency
RUN = .venv/bin/python

.PHONY: demo test row standin

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

standin: .venv/installed  ## retrain the SAM and CLIP stand-ins from scratch: hours on a CPU, minutes on a GPU
	$(RUN) -m common.standin.train_sam
	$(RUN) -m common.standin.train_clip

test: .venv/installed  ## install, run the tests
	$(RUN) -m pytest -q tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@
