# make demo      the main job: a real model learns medicine and rehearses what it knew (about ten minutes on 2 cores)
# make quick     the tests of the inner loop: under two minutes on 2 cores, no launches
# make test      the test suite
# make lint      ruff and mypy
# make package   the wheel, tried in an environment that has nothing else
# All create the environment in .venv first.

VENV := .venv
PYTHON := $(VENV)/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1

# What takes longest by far, or launches processes by accelerate. (Some of the rest start a Python of their own.)
NOT_QUICK := distributed $(addsuffix .py,$(addprefix test_,adapters benchmark causal_lms checkpoints cli comparison evaluation kernels launching model_card offline portable qlora recipe rehearsal_cases results trainer))

.PHONY: demo quick test lint package venv clean

demo: venv
	$(VENV)/bin/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/medical_ema.py

quick: venv
	$(PYTHON) -m pytest $(addprefix --ignore=tests/,$(NOT_QUICK))

test: venv
	$(PYTHON) -m trl_ema.offline
	$(PYTHON) -m pytest

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The wheel is built from the sdist, so that both are whole; and no extra is installed with it.
package: venv
	rm -rf build dist
	$(PYTHON) -m build --outdir dist .
	python3 -m venv build/empty
	build/empty/bin/python -m pip install --quiet --upgrade pip
	build/empty/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/empty/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build/empty && bin/python "$(CURDIR)/.ci/try_wheel.py"

venv: $(VENV)/.installed

# torch first and pinned, so that no later step replaces it.
$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet --constraint constraints.txt torch
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
