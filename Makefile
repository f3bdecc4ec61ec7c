# make demo: the whole study on the bundled model, ends with the path of its report.
# make test: lint, types and tests. Both make .venv and install what they need; again is quick.
PYTHON ?= $(shell command -v python3.11 || echo python3)
DEMO ?= relneuron-demo
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test clean

demo: $(VENV)/.demo
	$(BIN)/relneuron demo -o $(DEMO)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(INPUTS)
	$(PIP) install -c constraints.txt -e '.[hf,cli,plot]'
	touch $@

$(VENV)/.test: $(VENV)/.torch $(INPUTS)
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist relneuron/_cpu*.so
