# make quickstart | make test: set up .venv and run. Every target works from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check docs test-faults sabotage test-smollm2 test-llama-cpp test-study test-distributed test-latest-jax smollm2 smollm2-expert smollm2-scores bench lock clean

quickstart: $(VENV)/.installed
	$(BIN)/flexmoe quickstart --out runs/quickstart

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Formatting, lint, types, tests: what a change must pass.
check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

# The documentation, in docs/_build/html; its evidence is made from results/. Warnings are errors.
docs: $(VENV)/.installed
	$(BIN)/python -m docs.evidence
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

# A real model both ways: SmolLM2-135M-Instruct out of its wheel, against transformers. Three minutes.
test-smollm2: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/hf

# GGUF exports in llama.cpp: logits and greedy text, of tiny models and of SmolLM2 with three experts. Needs node >= 20.
LLAMA_CPP ?= /tmp/flexmoe-llama-cpp
export LLAMA_CPP
test-llama-cpp: $(VENV)/.installed $(LLAMA_CPP)/node_modules
	$(BIN)/python -m pytest -m slow tests/hf/test_llama_cpp.py

# Its npm package ships built binaries; no script of a package runs.
$(LLAMA_CPP)/node_modules:
	npm install --silent --ignore-scripts --prefix $(LLAMA_CPP) node-llama-cpp@3.22.1

# A whole small study of every baseline and ablation, on real text. Three minutes.
test-study: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/study

# Two and four real processes on this machine. Five minutes.
test-distributed: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/parallel

# SmolLM2 end to end: three owners beside it, merged, out to transformers and llama.cpp. Then its scores, and an owner
# against fine-tuning the whole model (experiments/smollm2.sh).
smollm2 smollm2-scores smollm2-expert: $(VENV)/.installed $(LLAMA_CPP)/node_modules
	PATH=$(CURDIR)/$(BIN):$$PATH experiments/smollm2.sh $@

# Kills, full disks, tampering, hostile packages, for real: prints what became of each. Full disks need root (tmpfs).
test-faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults

# Breaks promises of the package in a copy, one at a time: a named test must notice each. 17 minutes; words choose
# faults by name: `make sabotage ONLY="merge opt-out"`.
sabotage: $(VENV)/.installed
	$(BIN)/python -m tests.sabotage $(ONLY)

# Side by side with torch and the machine's limits; use a machine that does nothing else. `make bench ONLY="moe infer"`.
bench: $(VENV)/.installed
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m benchmarks $(ONLY)

# The tests that need no torch, on the newest Python here that has a newer jax, with the newest releases it resolves to.
LATEST_PYTHON ?= python3.12
test-latest-jax: .venv-latest/.installed
	.venv-latest/bin/python -m pytest -n 2 --dist worksteal -m "not torch and not slow"

$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.venv-latest/.installed: pyproject.toml
	$(LATEST_PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --disable-pip-version-check -e . pytest pytest-xdist hypothesis tiktoken
	touch $@

# Renews requirements.lock: what a fresh environment of the development extra resolves to, without build tags.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	.venv-lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) .venv-latest
