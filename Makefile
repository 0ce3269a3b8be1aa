# make demo | results | test | test-hosts | lint | docs: each sets up .venv itself; nothing is installed on a second run.
PYTHON ?=
BIN := .venv/bin
# DGL and torch lose most of their speed when threads outnumber cores; one thread per process is the rule here.
export OMP_NUM_THREADS ?= 1
# METIS repeats its answer always only without malloc's cache of small blocks (docs/architecture.md)
export GLIBC_TUNABLES ?= glibc.malloc.tcache_count=0

.PHONY: setup demo results test test-hosts lint docs clean
setup:
	@PYTHON="$(PYTHON)" sh tools/setup.sh

demo: setup
	@$(BIN)/python tools/demo.py

# the study of a recipe at the published size: make results NAME=nbody; the same command continues an interrupted one
results: setup
	@test -f recipes/$(NAME)/sweep-published.yaml || { echo "NAME=$(NAME): no such study; use NAME=nbody" >&2; exit 2; }
	test -f data/$(NAME)-full.h5 || $(BIN)/python recipes/$(NAME)/prepare.py --scale full --out data/$(NAME)-full.h5
	$(BIN)/distegnn sweep recipes/$(NAME)/sweep-published.yaml --jobs 2

# a file after the other in each of three processes, the longest first
test: setup
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# the part of it that needs root: emulated hosts, and what happens on them (docs/distributed.md)
test-hosts: setup
	$(BIN)/python -m pytest tests/distributed/test_hosts.py tests/distributed/test_many_machines.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

# the documentation as a site, in site/index.html; a link or a name that leads nowhere is an error
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q

clean:
	rm -rf .venv runs build site *.egg-info
