# On a fresh machine with Python >= 3.11, `make demo` and `make test` each work alone:
# the first makes .venv, which takes minutes; later ones start at once.
#
#   PYTHON=...   the interpreter to build on; if it has torch >= 2.11, that one is used
#   TORCH=...    the torch to install if it has none

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(or $(shell cat $(VENV)/base 2>/dev/null),python3)
TORCH ?= 2.13.0
# Another PYTHON has another stamp, so that it gets another .venv.
READY := $(VENV)/ready-$(subst /,-,$(PYTHON))

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/python -m ringcompile demo

test: $(READY)
	$(BIN)/python -m pytest -q -m "not gpu and not slow"

lint: $(READY)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

$(READY): pyproject.toml .ci/make_venv.py
	$(PYTHON) .ci/make_venv.py $(VENV) $(TORCH) $@
	@echo $(PYTHON) > $(VENV)/base
	@touch $@
