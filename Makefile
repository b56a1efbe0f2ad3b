# make demo · make test · make test-slow · make test-all · make check · make docs · make bytecode · make benchmark
# make wheel · make release-check · make matrix
# PYTHON chooses the interpreter (3.10 to 3.13); VENV where its environment lies.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# On a shared machine, threads that spin while they wait make small models many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow test-all check docs bytecode benchmark wheel release-check matrix clean

demo: $(INSTALLED)
	$(BIN)/lm_eval run --model sdar --model_args pretrained=demo --tasks gsm8k_sdar_demo --output_path demo_results --log_samples

test: $(INSTALLED)
	$(BIN)/python -m pytest tests -m "not slow" --numprocesses auto --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest tests -m slow --numprocesses auto --dist worksteal

# In one run, which starts and collects once.
test-all: $(INSTALLED)
	$(BIN)/python -m pytest tests --numprocesses auto --dist worksteal

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without --quiet, which would hide warnings from --strict.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Compiles the libraries of the tests. Where PYTHONDONTWRITEBYTECODE is set, each process would compile them, for 9 s.
bytecode: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= SDAR_LM_EVAL_AUTOLOAD=0 $(BIN)/python -c "import $(LIBRARIES)"
LIBRARIES = accelerate.commands.launch, hypothesis.strategies, lm_eval.__main__, lm_eval.evaluator, lm_eval.loggers, \
	matplotlib.pyplot, modal.__main__, scipy.stats, statsmodels.api, torch._dynamo, torch.distributed.run, \
	transformers.models.auto.tokenization_auto, transformers.models.qwen3.modeling_qwen3, triton.language

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/throughput.py

# Builds the sdist and the wheel, and runs the demo from the wheel in a fresh environment.
wheel: $(INSTALLED)
	$(BIN)/python tools/release_check.py --allow-placeholders

# The same, and refuses placeholders in the metadata and a changelog without a date.
release-check: $(INSTALLED)
	$(BIN)/python tools/release_check.py

# Needs uv (pip install uv), and interpreters of Python 3.10 to 3.13 on PATH.
matrix:
	$(PYTHON) tools/matrix.py

# torch first, on its own: the pinned version is a wheel for the CPU where an index offers one.
# --no-compile: Python compiles a module when something imports it, and nothing imports most of them.
PIP_INSTALL = $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo_results dist site
