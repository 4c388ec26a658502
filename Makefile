# `make demo`, `make test` and `make docs` do all set-up; they need Python 3.11 or newer, pip and a package index.
.POSIX:

PYTHON = python3
VENV = .venv
PIP_FLAGS =

.PHONY: help demo test docs clean

help:
	@echo "make demo   quantize a 135 M parameter language model, table and plot in outputs/demo"
	@echo "make test   the tests"
	@echo "make docs   the documentation site, in site/"
	@echo "make clean  remove the environment $(VENV)"
	@echo "PYTHON=/path/to/python3.11 chooses the interpreter, PIP_FLAGS=... adds to pip install"

# the stamp is newer than what it was installed from, so this happens once
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qexp needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[docs]"
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/qexp experiment=demo method=none
	$(VENV)/bin/qexp -m experiment=demo method=rtn,gptq weight.bits=4,3,2
	$(VENV)/bin/python scripts/report.py outputs/demo

# Tests of the functions that make tensors run with the shapes in their signatures checked, at half as much time again.
SHAPES = tests/test_gradients.py tests/grid tests/hessian/test_output.py tests/packed tests/quantizers tests/solvers \
	tests/training tests/walk tests/transforms/test_fixed.py tests/transforms/test_rotate.py

# one thread for each worker: the models of the tests are too small to share
test: $(VENV)/installed
	@if [ -z "$$QEXP_DATA_DIR" ] && [ -d ../shared/data ]; then \
		QEXP_DATA_DIR=$$(cd ../shared/data && pwd); export QEXP_DATA_DIR; fi; \
	export OMP_NUM_THREADS=1; pytest="$(VENV)/bin/python -m pytest -q -n auto --maxprocesses 8"; \
	$$pytest -m "not slow" --jaxtyping-packages=qexp,beartype.beartype $(SHAPES) && \
	$$pytest -m "not slow" $$(printf -- "--ignore=%s " $(SHAPES)) tests

# a broken link, a missing anchor or a page without a place in the navigation is an error; --quiet would hide them from --strict
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo "site/index.html"

clean:
	rm -rf $(VENV)
