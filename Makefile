# Every target works from a bare clone with Python 3.11 alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_ARGS ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(STAMP)  ## create .venv and fill it (PYTHON=python3.11 chooses the interpreter)

$(STAMP): pyproject.toml constraints.txt requirements-nodeps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; choose another: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps -r requirements-nodeps.txt
	@touch $@

demo: $(STAMP)  ## prune a real 135M model on this CPU; the report is runs/demo/report.html
	@case ' $(ARGS) ' in *' --replace '*) ;; *) test ! -e runs/demo || \
		{ echo "runs/demo exists: make demo ARGS=--replace runs it anew" >&2; exit 2; } ;; esac
	$(BIN)/selfpruner compress configs/demo.yaml --out runs/demo $(ARGS)
	@echo "open runs/demo/report.html"

test: $(STAMP)  ## run all tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)  ## style, types and the arrows between rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove .venv and caches (never runs/)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
