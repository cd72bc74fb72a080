# make help     what there is
# Everything happens in virtual environments in this directory; Python 3.11 or later and a package index are needed.

MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo

BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
DEMO_INSTALLED = $(DEMO_VENV)/.installed

.PHONY: help venv demo test soak quality bench bench-queues bench-files lossy docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      start a server, call it, stop it"
	@echo "make venv      an environment for development, in $(VENV)"
	@echo "make test      all tests"
	@echo "make quality   lint, format, types, documentation"
	@echo "make bench     protoframe beside its peers: a table, and docs/benchmarks.md; takes a quarter of an hour"
	@echo "make bench-queues  pf-queue beside RabbitMQ, NATS and Redis, and docs/queue-benchmarks.md; takes five minutes"
	@echo "make bench-files   pf-files beside rsync and scp, and docs/files-benchmarks.md; takes half an hour"
	@echo "make soak      the tests of chance and of hostile datagrams for many minutes"
	@echo "make lossy     calls over a link that loses packets; needs root, ip and iptables"
	@echo "make docs      the documentation, in docs/_build/html"
	@echo "make clean     remove what these made, environments included"

venv: $(INSTALLED)

# The stamp comes last: an environment whose installation broke off is made anew.
$(INSTALLED): setup.cfg pyproject.toml setup.py protoframe/files/_native.c
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

$(DEMO_INSTALLED): setup.cfg pyproject.toml
	@echo "Making an environment in $(DEMO_VENV); this takes a moment, once."
	@$(PYTHON) -m venv --clear $(DEMO_VENV)
	@$(DEMO_VENV)/bin/python -m pip install --quiet --editable .
	@touch $@

demo: $(DEMO_INSTALLED)
	@tools/demo.sh $(DEMO_VENV)/bin

# trial runs what is trial's; pytest runs that too, and all the rest, in as many processes as there are cores.
test: $(INSTALLED)
	$(BIN)/trial --jobs=2 tests
	$(BIN)/python -m pytest -n auto --dist loadfile

# As much more of what is left to chance as one has patience for.
soak: export PROTOFRAME_SEEDS ?= 5000
soak: export PROTOFRAME_DATAGRAMS ?= 1000000
soak: export PROTOFRAME_KILLS ?= 20
soak: export PROTOFRAME_CUTS ?= 5000
soak: $(INSTALLED)
	$(BIN)/python -m pytest -o faulthandler_timeout=3600 tests/test_seeds.py tests/test_client_seeds.py tests/test_client_processes.py \
		tests/test_datagrams_hostile.py tests/test_power_cut.py tests/test_queue_power.py \
		tests/test_queue_processes.py tests/test_queue_disks.py tests/queues/test_store_model.py tests/files

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m benchmarks
	$(BIN)/python benchmarks/outages.py

bench-queues: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m benchmarks.queues --docs

bench-files: $(INSTALLED)
	$(BIN)/python -m benchmarks.files --docs

# 77 says that there can be no network of its own here.
lossy: $(INSTALLED)
	$(BIN)/python tools/lossy.py || test $$? -eq 77

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -n -b html docs docs/_build/html

clean:
	rm -rf $(VENV) $(DEMO_VENV) .venv-ci .venv-ci-demo build dist protoframe.egg-info docs/_build
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache _trial_temp*
	rm -f dropin.cache twisted/plugins/dropin.cache
	find protoframe tests twisted -name __pycache__ -type d -prune -exec rm -rf {} +
