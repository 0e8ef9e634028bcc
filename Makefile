# Two commands: `make demo` shows the whole path, `make test` runs the whole test suite. Both set up .venv first, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# torch's default wheel on PyPI brings gigabytes of CUDA; tests and the demonstration need the CPU only.
TORCH  ?= torch==2.13.0

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/mbq-gguf demo

test: $(VENV)/.installed
	$(BIN)/mbq-gguf build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build
