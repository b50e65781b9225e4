# `make demo` and `make test` need Python (3.10 or newer) and g++, and set up the rest in .venv.
PYTHON ?= python3
CXX ?= g++
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
# Two parts share the cores: a thread that waits for another must not spin meanwhile.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

.PHONY: help build demo test test-all bench gpu lint format sanitize clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A torch that $(PYTHON) already has is used as it is, whatever its version.
$(VENV)/constraints.txt: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastgpt needs Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make a virtual environment: install python3-venv" >&2; exit 1; }
	@echo "making $(VENV)"; rm -rf $(VENV)
	@$(PYTHON) -m venv --system-site-packages $(VENV)
	@if $(BIN)/python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)'; then \
		grep -vE '^(torch|triton)==' constraints.txt > $@; \
	else \
		$(PYTHON) -m venv --clear $(VENV) && cp constraints.txt $@; \
	fi

# The kernels are compiled before the large downloads: a missing compiler is noticed in seconds, and the editable
# install finds the objects done.
$(READY): $(VENV)/constraints.txt pyproject.toml
	$(BIN)/python -m pip install -q -c $< setuptools pybind11 ninja
	FASTGPT_EMULATE_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m pip install -c $< --no-build-isolation -e '.[dev]'
	@touch $@

# The CUDA kernels are compiled for the host too, for the tests: see csrc/cuda/emulate.h.
build: $(READY)  ## compile what has changed in csrc
	FASTGPT_EMULATE_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace

demo: build  ## train a small GPT on three paths, side by side, and let it write
	$(BIN)/fastgpt demo

# In processes of their own, because Triton interprets either all kernels or none; two at a time, the longest first.
EMULATED := TRITON_INTERPRET=1 FASTGPT_CUDA_EMULATION=1 $(PYTEST)
OFFLINE := tests/test_offline.py tests/test_offline_cuda.py
PARTS := $(MAKE) --no-print-directory -j2 --output-sync=target \
	test-emulated-attention test-plain test-emulated-rest test-offline

test: build  ## the tests, without the slow ones
	@echo "four parts, two side by side; each is shown when it is done"
	@$(PARTS) CHOSEN='not slow and'

test-all: build  ## all tests
	@echo "four parts, two side by side; each is shown when it is done"
	@$(PARTS)

.PHONY: test-plain test-offline test-emulated-attention test-emulated-rest
test-plain:
	$(PYTEST) -q -m "$(CHOSEN) not interpreter" $(OFFLINE:%=--ignore=%) --durations=15

test-offline:
	$(PYTEST) -q -m "$(CHOSEN) not interpreter" $(OFFLINE) --durations=5

test-emulated-attention:
	$(EMULATED) -q -m "$(CHOSEN) interpreter" -k attention --durations=15

test-emulated-rest:
	$(EMULATED) -q -m "$(CHOSEN) interpreter" -k "not attention" --durations=15

bench: build  ## the quick benchmark suite
	$(BIN)/python -m benchmarks --suite quick

# No .venv: $(PYTHON) is taken as it is, with the torch and Triton that it holds, and nothing is downloaded.
# OUT=directory BUDGET=seconds PART=check,bench,tune,races FULL=1; DRY=1 rehearses it on a machine without a GPU.
gpu:  ## on a machine with a GPU: check, benchmark, tune and race the kernels; leaves one archive
	$(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT)) $(if $(BUDGET),--budget $(BUDGET)) \
		$(if $(PART),--part $(PART)) $(if $(FULL),--full) $(if $(DRY),--dry)

lint: $(READY)  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastgpt kernels/fastgpt_kernels benchmarks
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)  ## let ruff and clang-format put the files in shape
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# A second build of everything in build/sanitize; Python itself is not instrumented, so the run-time is preloaded. The
# first command proves that the instrumented module is the one under test. A finding aborts, with Python's traceback.
SANITIZED = PYTHONPATH=build/sanitize/lib LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1
SANITIZE_TESTS = -q --capture=sys -o pythonpath="build/sanitize/lib tests" -k cpu tests/test_ops.py tests/test_cpu_gemm.py
sanitize: $(READY)  ## the op tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	FASTGPT_SANITIZE=1 FASTGPT_CUDA=0 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	$(SANITIZED) $(BIN)/python -c \
		'import fastgpt_kernels as k; assert "build/sanitize/lib" in k.load_cpu().__file__, k.load_cpu().__file__'
	$(SANITIZED) FASTGPT_CPU_ISA=generic $(PYTEST) $(SANITIZE_TESTS)
	$(SANITIZED) $(PYTEST) $(SANITIZE_TESTS)

clean:  ## remove what was built, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f kernels/fastgpt_kernels/*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
