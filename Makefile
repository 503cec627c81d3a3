# Two commands do all the set-up on a fresh machine: `make demo` and `make test`. CI runs the same two (.ci/run).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
DEMO_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml $(shell find exllama_ops csrc _build_backend -type f ! -name '*.pyc')

.DEFAULT_GOAL := help
.PHONY: help demo test lint prose examples unit triton gpu gpu-dry-run build clean

help: ## say what can be made
	@echo "make demo      install into $(VENV), and let a small model answer a question"
	@echo "make test      install into $(VENV) to work on the code, and run all that CI runs"
	@echo
	@echo "Parts of make test:"
	@echo "make lint      ruff, mypy"
	@echo "make prose     the limits for documents, docstrings and comments"
	@echo "make unit      pytest"
	@echo "make triton    the Triton kernels in Triton's interpreter"
	@echo
	@echo "make gpu       all that a GPU can show, with the torch of PYTHON and no network (docs/gpu.md)"
	@echo "make gpu-dry-run  walk it without a GPU"
	@echo "make examples  run the examples of README.md and docs/"
	@echo "make clean     remove $(VENV) and caches of tools"
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) WORKERS=$(WORKERS) DEMO_ARGS=\"$(DEMO_ARGS)\" ARGS=\"$(ARGS)\""

# A newcomer's installation: a copy of the package, with what runs models. It leaves an editable one in place.
$(VENV)/demo.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -e $(VENV)/test.stamp || $(PIP) $(TORCH) ".[hf]"
	touch $@

# An editable installation, with what the tests need.
$(VENV)/test.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) -e ".[test]"
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/exllama-ops run $(DEMO_ARGS)

test: lint prose unit triton

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

prose:
	$(PYTHON) tools/prose.py --check

examples: $(VENV)/test.stamp
	$(BIN)/python tools/examples.py README.md docs

unit: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(WORKERS)

triton: $(VENV)/test.stamp
	EXLLAMA_OPS_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/conformance

# In the environment that is there: a machine with a GPU is often one without a network.
gpu:
	$(PYTHON) -m tools.gpu_hour $(ARGS)

gpu-dry-run:
	$(PYTHON) -m tools.gpu_hour --dry-run $(ARGS)

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache
