# Needs Python 3.11 or newer and make; `make demo` or `make test` on a fresh clone sets up .venv by itself.
#   PYTHON=/path/to/python3   the Python to build .venv from
#   TORCH="..."               what pip installs as torch, for instance on a machine without an NVIDIA GPU:
#                             TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
TORCH ?= $(if $(GPU),torch,torch==2.13.0)
# With a GPU, somebody chose a torch for its driver: keep it, and do not pin another.
HAS_CUDA_TORCH := $(PYTHON) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null
# The same steps on the same batches with next-token loss only.
AS_CONTROL := objective=ntp objective_options={} decoder=null
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

.PHONY: help demo test lint format bench report embedded wheel-test clean

help:           ## This list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.base  ## Two prompts by the embedded model, against next-token decoding.
	@echo '--- An addition. Tokens of one colour were decided by the same forward pass.'
	@printf '478 + 395 = ?\n' | $(BIN)/setflow generate - --compare
	@echo '--- A Python function.'
	@printf 'def read_lines(path):\n    """Return' | $(BIN)/setflow generate - --max-new-tokens 100 --compare

test: lint      ## Style and tests, as CI runs them.
	$(BIN)/python -m pytest -q

lint: $(VENV)/.dev  ## Style only.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## Put the code into the style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## The measurements of the README, written into benchmarks/; takes an hour.
	$(BIN)/setflow finetune embedded-draft
	$(BIN)/setflow bench quality
	$(BIN)/setflow bench quality --temperature 0.7 --name quality-sampled
	$(BIN)/setflow bench lossless
	$(BIN)/setflow bench lossless --dtype bf16 --name lossless-bf16
	$(BIN)/setflow bench speed --assistant build/embedded-draft
	$(BIN)/setflow bench speed --assistant build/embedded-draft --dtype bf16 --name speed-bf16
	$(BIN)/setflow bench memory

# HumanEval, MBPP and GSM8K come from the folder in SETFLOW_DATA or from the hub; generated code runs in the sandbox.
# The control is a model that `make embedded` leaves in build/; without it table 1 lacks its row.
CONTROL := $(if $(wildcard build/embedded-control/config.json),--control build/embedded-control)
REPORT := benchmarks/results/report
TABLE1 := --decoder ntp --decoder sbd:block_size=16,entropy_bound=0.35 --decoder sbd:block_size=16,entropy_bound=0.1 \
	--decoder sbd:block_size=16,entropy_bound=0.03,anchor=true,commit=prefix --decoder sbd-lossless:block_size=8
report: $(VENV)/.dev  ## Quality against speed, small-scale table 1, HumanEval and a trace, in benchmarks/results/report/; minutes.
	printf '478 + 395 = ?\n' | $(BIN)/setflow eval trace - --decoder sbd-lossless:block_size=8 --out $(REPORT)/trace.svg
	$(BIN)/setflow eval sweep --out $(REPORT) --limit 50
	$(BIN)/setflow eval sweep --out $(REPORT) --name sampled --tasks additions --limit 25 --temperature 0.7 --seed 0 --seed 1 --seed 2
	$(BIN)/setflow eval sweep --out $(REPORT) --name humaneval --tasks humaneval --max-gen-toks 64 --confirm-run-unsafe-code
	$(BIN)/setflow eval sweep --out $(REPORT) --name table1 --tasks additions,next_statement,humaneval,mbpp,gsm8k --limit 20 \
		--max-gen-toks 192 $(CONTROL) $(TABLE1) --confirm-run-unsafe-code

embedded: $(VENV)/.dev  ## Train the embedded model anew and put it into the package; takes hours.
	$(BIN)/setflow corpus build/corpus
	$(BIN)/setflow finetune embedded-ntp
	$(BIN)/setflow finetune embedded-sbd
	$(BIN)/setflow finetune embedded-sbd-additions
	$(BIN)/setflow finetune embedded-sbd $(AS_CONTROL) output=build/embedded-control-2
	$(BIN)/setflow finetune embedded-sbd-additions $(AS_CONTROL) model=build/embedded-control-2 output=build/embedded-control
	$(BIN)/python -m setflow.embed build

wheel-test: $(VENV)/.dev  ## Build the wheel, install it elsewhere and run it there.
	$(BIN)/python -m pytest -q -m slow tests/setflow/test_wheel.py

clean:          ## Remove .venv and what tools leave behind; build/ holds trained models and stays.
	rm -rf $(VENV) dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'setflow needs Python 3.11 or newer; say make PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'setting up $(VENV), once: torch first, then the rest'
ifeq ($(GPU),yes)
	@if $(HAS_CUDA_TORCH); then $(PYTHON) -m venv --system-site-packages $(VENV); \
		else $(PYTHON) -m venv $(VENV) && $(PIP_INSTALL) $(TORCH); fi
	@grep -v '^torch==' constraints.txt >$(VENV)/constraints.txt
else
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) $(TORCH)
	@cp constraints.txt $(VENV)/constraints.txt
endif
	@$(PIP_INSTALL) -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo 'installing what tests and training need, once'
	@$(PIP_INSTALL) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@
