# `make demo` and `make test` need Python 3.11 to 3.13 and nothing else: the first of them to run fills .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SETUP := $(VENV)/.setup-done
PARITY_SETUP := $(VENV)/.parity-setup-done
CHECK_PYTHON := import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit( \
	"nmjax needs Python 3.11, 3.12 or 3.13; %s is %d.%d. Try: make PYTHON=python3.12" % (sys.executable, v[0], v[1]))

.PHONY: demo test test-slow parity parity-setup lint typecheck benchmark lock clean setup

demo: $(SETUP)
	$(PY) -m experiments.calibration_under_influence --max_questions=1000

# Most of it is compilation, which a few processes share through a cache on disk. What makes programs fast and compiling
# slow is off (LLVM's optimizations, the emitters of fused loops), or it would take twice as long; `test-slow` runs the
# engine's tests once more, compiled as users compile. Threads of the linear algebra on the host would only fight for the
# processors that the processes share.
QUICKLY := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false
test: $(SETUP)
	OPENBLAS_NUM_THREADS=1 XLA_FLAGS="$(XLA_FLAGS) $(QUICKLY)" $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(SETUP)
	$(PY) -m pytest -m slow
	$(PY) -m pytest tests/nmjax -n auto --maxprocesses 4 --dist loadfile

# Live comparisons with torch. `parity-setup` is apart so that CI can tell "no torch to be had" from a failed test.
parity: parity-setup
	$(PY) -m pytest -m parity

parity-setup: $(PARITY_SETUP)

lint: $(SETUP)
	$(PY) -m ruff check .

typecheck: $(SETUP)
	$(PY) -m mypy

benchmark: $(SETUP)
	$(PY) -m experiments.benchmark
	$(PY) -m experiments.benchmark_calibration

setup: $(SETUP)

# A virtual environment that is broken or of an unsupported Python is built anew; any other is brought up to date.
$(SETUP): requirements.lock pyproject.toml
	@$(PY) -c 'import pip; $(CHECK_PYTHON)' 2>/dev/null || { $(PYTHON) -c '$(CHECK_PYTHON)' && $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing into $(VENV) (one to two minutes, once)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(PARITY_SETUP): $(SETUP) requirements-parity.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-parity.txt \
		&& $(PY) -c 'import torch' \
		|| { echo "parity: torch could not be installed (requirements-parity.txt); see the message above" >&2; exit 1; }
	@touch $@

# Writes requirements.lock anew from pyproject.toml: every dependency of the project and of `dev`, for every platform
# and Python from 3.11 on, with hashes. Add `LOCK_FLAGS=--upgrade` to move the pinned versions.
lock: $(SETUP)
	$(PY) -m pip install --quiet uv
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--custom-compile-command 'make lock' --quiet $(LOCK_FLAGS) --output-file requirements.lock

# What was built or cached; results, converted checkpoints and .venv stay.
clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find nmjax models experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
