# Everything by one command each, on a Debian 12 that has nothing but make. See `make help`.

PYTHON := /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(shell sed '/^\#/d;/^$$/d' packages.txt)
POLICY := /usr/sbin/policy-rc.d
export DEBIAN_FRONTEND := noninteractive

.PHONY: help demo test bench lint setup packages lock clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: packages $(VENV)/ready ## start a lab, show what passes and what is blocked, follow the events (root)
	$(BIN)/bulkhead lab demo $(DEMO)

test: packages $(VENV)/ready ## every test (root; those that need it are skipped otherwise). TESTS=path for some
	$(BIN)/python -m pytest -n 6 --dist loadfile --no-loadscope-reorder $(TESTS)

bench: packages $(VENV)/ready ## measure against the peers (root). BENCH="--flows 50000" for other sizes
	mkdir -p build
	$(BIN)/python -m bench --out build/bench.json $(BENCH)

lint: $(VENV)/ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: packages $(VENV)/ready ## what the others need: Debian packages and a virtual environment

# What builds packages comes first and is pinned like the rest: nothing is fetched that is not in the lock.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation
$(VENV)/ready: requirements.lock setup.cfg pyproject.toml | packages
	$(PYTHON) -m venv $(VENV)
	sed -nE '/^(setuptools|wheel|packaging)==/,/[^\\]$$/p' requirements.lock > $(VENV)/build.txt
	$(PIP) --require-hashes -r $(VENV)/build.txt
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps -e .
	touch $@

# Open vSwitch is installed for its programs; the lab runs its own. So its services are kept from starting here, by
# Debian's policy-rc.d, which is put back as it was. What is installed already is left alone, running or not.
packages:
	@missing=$$(for package in $(PACKAGES); do \
	    dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed || echo $$package; \
	done); \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" != 0 ]; then \
	    echo "these packages are missing; install them, or use sudo:" $$missing >&2; exit 1; \
	fi; \
	policy=$(POLICY); \
	if [ ! -e $$policy ]; then \
	    trap "rm -f $$policy" EXIT; trap 'exit 1' HUP INT TERM; \
	    printf '#!/bin/sh\nexit 101\n' > $$policy; chmod 755 $$policy; \
	fi; \
	apt-get update -q && apt-get install -q -y --no-install-recommends $$missing

lock: ## choose new versions for requirements.lock
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet pip-tools
	build/lock/bin/pip-compile --quiet --upgrade --generate-hashes --allow-unsafe --strip-extras --no-header \
	    --no-annotate --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
	    --output-file requirements.lock requirements.in

clean: ## remove what the others made here, not the packages
	rm -rf $(VENV) build dist bulkhead.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
