# make demo | test | lint | bench | evidence... | chaos | soak; the first call creates .venv from pyproject.toml and constraints.txt
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench evidence evidence-doctor evidence-experts evidence-preflight evidence-store ablations chaos mutation soak soak-core peers evidence-train transfer-lift
MINUTES ?= 30
REPEAT ?= 20

demo: $(VENV)/.installed  ## the main job, end to end; an interrupted one continues
	@$(BIN)/dita env --setup
	@$(BIN)/dita demo

test: $(VENV)/.installed
	@$(BIN)/dita env --setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not live"
	$(BIN)/pytest -m live

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed  ## ratios against peers, full size, on an idle machine; ROWS="denoise_exact memory" for some
	@$(BIN)/python -m benchmarks $(ROWS)

evidence: $(VENV)/.installed  ## hours: three training seeds, baselines, multitask; resumes; writes docs/evidence
	@$(BIN)/python benchmarks/evidence.py

evidence-doctor: $(VENV)/.installed  ## minutes: precision and recall of the doctor; writes docs/evidence/doctor.md
	@$(BIN)/python benchmarks/doctor.py

evidence-experts: $(VENV)/.installed  ## minutes: how often each scripted expert solves its task, by noise; writes docs/evidence/experts.md
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sim]'
	@$(BIN)/python -m benchmarks.experts

evidence-preflight: $(VENV)/.installed  ## minutes: which mistakes preflight names; writes docs/evidence/preflight.md
	@$(BIN)/python benchmarks/preflight.py

evidence-store: $(VENV)/.installed  ## minutes: kills, bit flips and every other fault of a store; resumes
	@$(BIN)/python benchmarks/store_faults.py

ablations: $(VENV)/.installed  ## hours: what decides our defaults, three training seeds each; ARGS="spacing frames"; resumes
	@$(BIN)/python -m benchmarks.ablations $(ARGS)

peers: $(VENV)/.installed  ## hours, or days with the published epochs: other policies on the same demonstrations and starts; ARGS="--budget small"; resumes
	@$(BIN)/python -m benchmarks.peers $(ARGS)

transfer-lift: $(VENV)/.installed  ## a day: pretraining against from scratch on a held-out arm; resumes; ARGS="--budget-minutes 60"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sim,finetune]'
	@$(BIN)/python -m benchmarks.transfer_lift $(ARGS)

evidence-train: $(VENV)/.installed  ## half an hour: kills, stops, damage and full disks of training; resumes
	@$(BIN)/python benchmarks/train_faults.py

chaos: $(VENV)/.installed  ## under an hour, on an idle machine: every fault of the live stack, REPEAT times; resumes
	@$(BIN)/python -m benchmarks.chaos --repeat $(REPEAT) $(if $(ROWS),--rows $(ROWS))

soak: $(VENV)/.installed  ## MINUTES armed, on an idle machine, adds to what was played; writes docs/evidence/live_soak.md
	@$(BIN)/python -m benchmarks.live_soak --minutes $(MINUTES)

mutation: $(VENV)/.installed  ## hours: mutates the guard's core against tests/test_guard.py; resumes
	@$(BIN)/python benchmarks/mutation.py $(ARGS)

soak-core: $(VENV)/.installed  ## hours: the guard's core through random events on a fake clock, 1e7 ticks; resumes
	@$(BIN)/python benchmarks/soak_core.py $(ARGS)

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Dita needs Python 3.11 or 3.12 with venv: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sim-core,robot,convert,dev]'
	@touch $@
