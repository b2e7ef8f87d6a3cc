# Everything runs in an environment of its own, made once from pinned dependencies.
VENV   ?= .venv
PYTHON ?= python3
BIN     = $(VENV)/bin

PAGES   = mirror_opt mirror_opt.optim mirror_opt.ops mirror_opt.backends mirror_opt.fewshot \
          mirror_opt.meta.engines mirror_opt.meta.stability mirror_opt.maps.base \
          mirror_opt.maps.separable mirror_opt.runs mirror_opt.runs.recovery mirror_opt.newton \
          mirror_opt.newton_cg mirror_opt.reference mirror_opt.kernels

.PHONY: all always install test lint docs demo clean

all: test

# torch is asked for by its exact version on a line of its own: any looser requirement would pull a
# build for GPUs of several gigabytes where a CPU build is at hand.
$(BIN)/.installed: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet $$(grep '^[a-z]' constraints.txt)
	touch $@

# Python files are used where they lie. csrc itself is newer where a file was added or removed; the
# libraries that MIRROR_OPT_BUILD_EXT names are not told by any file.
$(BIN)/.built: $(BIN)/.installed csrc $(wildcard csrc/* kernels/*.py)
$(BIN)/.built: $(if $(MIRROR_OPT_BUILD_EXT),always)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

install: $(BIN)/.built

lint: install
	$(BIN)/ruff check .
	# As the oldest Python that is served, and as a newer one than is likely to be here.
	$(BIN)/mypy --python-version 3.10
	$(BIN)/mypy --python-version 3.13

# All tests, one thread for each process: the tensors are small, and the results the same everywhere.
# The lines of the package that they run are counted, the kernels' by Triton's interpreter; too few
# are an error.
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses auto --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --show-missing

# Pages of all modules from their docstrings, in build/api; a warning is an error.
docs: install
	$(BIN)/python -W error -m pdoc --docformat google --math --output-directory build/api $(PAGES)

# A few minutes, on one thread: a second gains little here, and where its core is taken the two wait
# for each other at every operation. Pictures, table and rows in runs/demo/.
demo: install
	$(BIN)/mirror-opt compare --task glyphs --methods maml,meta-curvature,mirror --threads 1 \
	    --iterations 150 --test-tasks 200 --queries 5 --adapt-steps 0,1,2,3,5,10 \
	    --out runs/demo --overwrite

clean:
	rm -rf $(VENV) build dist *.egg-info runs/demo
