# Everything here needs only make and Python 3.11 or newer with its venv module.
# `make` alone lists the targets.

PYTHON ?= python3
VENV = .venv
PEERS = .venv-peers
RUN = $(VENV)/bin/python -m

.PHONY: help demo examples test bench bench-peers lint types docs wheel format clean FORCE
.NOTPARALLEL: # two pips must not write to one environment at once
.DELETE_ON_ERROR:

help:
	@echo "make demo         install what the examples need and run examples/quickstart.py"
	@echo "make examples     run all of examples/ in full, a few minutes each"
	@echo "make test         install what the tests need and run them (PYTEST_ARGS='-k energy' adds arguments)"
	@echo "make bench        run the benchmarks"
	@echo "make bench-peers  compare with torchebm and PyTorch, which go into $(PEERS)"
	@echo "make lint         check style with ruff"
	@echo "make format       apply ruff's fixes and formatting"
	@echo "make types        check types with mypy"
	@echo "make docs         build the documentation, and run its tutorials and examples"
	@echo "make wheel        build what is released into dist/, and try it in an empty environment"
	@echo "make clean        remove everything the targets above made"
	@echo
	@echo "Packages go into $(VENV). Another interpreter: make test PYTHON=python3.13 VENV=.venv313"

demo: $(VENV)/.extra-examples
	$(VENV)/bin/python examples/quickstart.py

examples: $(VENV)/.extra-examples
	for example in examples/*.py; do echo "== $$example"; $(VENV)/bin/python $$example || exit 1; done

test: $(VENV)/.extra-test
	$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

bench: $(VENV)/.extra-examples
	$(RUN) benchmarks.run $(BENCH_ARGS)

bench-peers: $(PEERS)/.peers
	$(PEERS)/bin/python -m benchmarks.peers $(BENCH_ARGS)

lint: $(VENV)/.extra-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: $(VENV)/.extra-dev
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

types: $(VENV)/.extra-dev
	$(RUN) mypy

docs/_build:
	mkdir -p $@

# The examples in the text, and beside them the pages with the tutorials. What is found wrong is shown at the end.
docs: $(VENV)/.extra-docs | docs/_build
	$(RUN) sphinx -W --keep-going --no-color -D nb_execution_mode=off -D suppress_warnings=myst-nb.lexer \
	    -b examples docs docs/_build/examples >docs/_build/examples.log 2>&1 & examples=$$!; \
	$(RUN) sphinx -W --keep-going --quiet -b html docs docs/_build/html; html=$$?; \
	wait $$examples; examples=$$?; \
	if [ $$examples = 0 ]; then grep "executed in" docs/_build/examples.log; else cat docs/_build/examples.log; fi; \
	[ $$html = 0 ] && [ $$examples = 0 ]
	$(RUN) pytest -q -p no:cacheprovider docs/check_site.py

wheel: $(VENV)/.extra-dev
	rm -rf dist
	$(RUN) build
	$(RUN) twine check --strict dist/*
	PYTHON=$(abspath $(VENV))/bin/python tools/test_wheel.sh dist/*.whl

clean:
	rm -rf $(VENV) $(PEERS) build dist docs/_build examples/output .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra; it is remade when pyproject.toml or the interpreter changes.
$(VENV)/.extra-%: pyproject.toml $(VENV)/.interpreter
	@echo "Installing numpyro-score and its '$*' extra into $(VENV); the first time takes a few minutes."
	$(RUN) pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(PEERS)/.peers: pyproject.toml benchmarks/peers.txt $(PEERS)/.interpreter
	@echo "Installing numpyro-score, torchebm and PyTorch into $(PEERS); the first time takes a few minutes."
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --editable . -r benchmarks/peers.txt
	@touch $@

# Rewritten, with a new environment, only when $(PYTHON) is not the interpreter that is there.
$(VENV)/.interpreter $(PEERS)/.interpreter: FORCE
	@command -v $(PYTHON) >/dev/null || { \
	    echo "There is no $(PYTHON) here. Please install Python 3.11 or newer, or name it: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "numpyro-score needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) has no venv module. On Debian and Ubuntu, install the package python3-venv." >&2; exit 1; }
	@new=$$($(PYTHON) -c 'import sys; print(*sys.version_info[:2], sys.base_prefix)'); \
	if [ "$$new" != "$$(cat $@ 2>/dev/null)" ]; then \
	    $(PYTHON) -m venv --clear $(@D) && echo "$$new" > $@; \
	fi
