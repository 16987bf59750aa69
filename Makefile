# The only commands; CI runs the same (.ci/run). Nothing outside $(VENV) is changed.
#   make demo                      the bundled model answers questions on this machine
#   make test                      linters, types, tests
#   make demo PYTHON=python3.12    another interpreter, 3.11 or newer
PYTHON ?= python3
VENV ?= .venv

# With a CUDA GPU any PyTorch that pyproject.toml allows; without one exactly this version, which the
# project's CPU figures are measured with. On Linux pip's usual index has only CUDA builds,
# so PyTorch's own index of CPU builds is asked too, and its build is preferred.
TORCH_CPU ?= torch==2.13.0
TORCH_CUDA ?= torch>=2.11,<2.14
CPU_INDEX := https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null)
TORCH := $(if $(HAS_GPU),$(TORCH_CUDA),$(TORCH_CPU))
# Where PyTorch comes from instead, and nowhere else: make demo TORCH_INDEX=<url>
TORCH_INDEX ?=
ifneq ($(TORCH_INDEX),)
TORCH_FROM := --index-url $(TORCH_INDEX)
else ifeq ($(HAS_GPU)$(shell uname -s),Linux)
TORCH_FROM := --extra-index-url $(CPU_INDEX)
endif
ifneq ($(HAS_GPU),)
DOWNLOAD := PyTorch with CUDA libraries, about 3 GB, and packages, about 200 MB
else
DOWNLOAD := PyTorch for CPUs, about 200 MB, and packages, about 200 MB (if $(CPU_INDEX) cannot be \
	reached, pip may bring CUDA libraries of 3 GB: then name an index with TORCH_INDEX=)
endif

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
INSTALLED_DEV := $(VENV)/installed-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-browser test-ray check bench report clean

help:
	@sed -n 's/^#   //p' Makefile
	@echo "check: linters and types | test-gpu: tests that need a CUDA GPU"
	@echo "test-browser: the playground in headless Chromium | bench: CPU figures"
	@echo "test-ray: replicas on a local Ray cluster"
	@echo "report: README's tables and plots from bench/results"

demo: $(INSTALLED)
	$(BIN)/longspan demo

check: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread: the tests' shapes are small, and more threads only wait for each other. Two processes
# side by side (make test JOBS=8: as many as you have cores); what measures time comes afterwards.
JOBS ?= 2
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal \
		-m "not gpu and not browser and not alone"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "alone and not gpu and not browser" \
		$$(grep -rl --include='test_*.py' mark.alone tests)

# Hopper's own kernels run nowhere else.
COMPUTE_CAPABILITY = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)
GPU_TESTS = gpu$(if $(filter 9.0,$(firstword $(COMPUTE_CAPABILITY))),, and not hopper)
test-gpu: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -q -m "$(GPU_TESTS)"

# Needs chromium and chromedriver.
test-browser: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser tests/serve

test-ray: $(INSTALLED_DEV)
	$(PIP) install -e '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -W default tests/serve/try_ray.py # Ray has warnings of its own

bench: $(INSTALLED_DEV)
	$(BIN)/longspan bench cpu

report: $(INSTALLED_DEV)
	$(BIN)/python -m bench.report

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# Stamps: installed once, and again when pyproject.toml changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("longspan needs Python 3.11 or newer; name one, for \
	example make demo PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "Downloading into $(VENV): $(DOWNLOAD)"
	$(PIP) install --no-deps $(TORCH_FROM) '$(TORCH)'  # what it needs comes with the package
	$(PIP) install -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Downloading into $(VENV): tools for tests and what they test, about 500 MB"
	$(PIP) install -e '.[dev]'
	@touch $@
