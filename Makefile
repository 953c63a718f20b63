# Every target works from a bare clone with Python 3.11 alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
PIP_ARGS ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv venv-vllm demo demo-vllm test soak bench-cost bench-search bench-backend bench-cluster bench-speed lint clean

define check-python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is older than 3.11; choose another: make PYTHON=python3.11 ..." >&2; exit 1; }
endef

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(STAMP)  ## create .venv and fill it (PYTHON=python3.11 chooses the interpreter)

$(STAMP): pyproject.toml constraints.txt requirements-nodeps.txt
	$(check-python)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[cluster,dev]'
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps -r requirements-nodeps.txt
	@touch $@

venv-vllm: $(VLLM_STAMP)  ## create .venv-vllm, in which a vLLM server runs on this CPU (2.5 GB)

# torch first and with what it asks for: that differs from build to build. This project last, for
# its plug-in: with it vLLM serves exported models without running their code.
$(VLLM_STAMP): requirements-vllm.txt pyproject.toml
	$(check-python)
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install $(PIP_ARGS) -c requirements-vllm.txt torch
	$(VLLM_VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps -r requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps -e .
	@touch $@

demo: $(STAMP)  ## prune a real 135M model on this CPU; the report is runs/demo/report.html
	@case ' $(ARGS) ' in *' --replace '*) ;; *) test ! -e runs/demo || \
		{ echo "runs/demo exists: make demo ARGS=--replace runs it anew" >&2; exit 2; } ;; esac
	$(BIN)/selfpruner compress configs/demo.yaml --out runs/demo $(ARGS)
	@echo "open runs/demo/report.html"

demo-vllm: $(STAMP) $(VLLM_STAMP)  ## the demo, driven by a vLLM server that the command starts
	@case ' $(ARGS) ' in *' --replace '*) ;; *) test ! -e runs/demo-vllm || \
		{ echo "runs/demo-vllm exists: make demo-vllm ARGS=--replace runs it anew" >&2; exit 2; } ;; esac
	$(BIN)/selfpruner compress configs/demo.yaml --out runs/demo-vllm \
		--set driver.kind=vllm --set driver.python=$(VLLM_VENV)/bin/python $(ARGS)
	@echo "open runs/demo-vllm/report.html"

test: $(STAMP)  ## run all tests but the soak
	$(BIN)/python -m pytest $(ARGS)

soak: $(STAMP)  ## kill and resume searches many times, and the demo itself (20 minutes)
	$(BIN)/python -m pytest -m soak $(ARGS)

bench-cost: $(STAMP)  ## what scoring a plan costs, beside a full forward pass (hours)
	$(BIN)/python -m benchmarks.cost $(ARGS)

bench-search: $(STAMP)  ## every allocator at equal evaluations, five seeds, two budgets (hours)
	$(BIN)/python -m benchmarks.search $(ARGS)

bench-backend: $(STAMP)  ## recipes side by side (ARGS='--data-root DIR' for C4 and WikiText-2)
	$(BIN)/python -m benchmarks.recipes $(ARGS)

bench-cluster: $(STAMP)  ## two Ray workers beside two independent processes (5 minutes)
	$(BIN)/python -m benchmarks.cluster $(ARGS)

bench-speed: $(STAMP)  ## LLaMA-2-70B shapes on one GPU (ARGS='--device cpu --scale small' without)
	$(BIN)/python -m benchmarks.speed_70b $(ARGS)

lint: $(STAMP)  ## style, types and the arrows between rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove .venv, .venv-vllm and caches (never runs/)
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
