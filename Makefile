# make tiny: set up and run the whole experiment in miniature.   make test: set up and run every test.
SHELL := /bin/bash
.DEFAULT_GOAL := help
export OMP_WAIT_POLICY := PASSIVE
RUN := .venv/bin
BESIDE := -n 2 --dist loadfile  # two processes; what is marked alone runs alone

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.ready  ## Python environment and system libraries
	@echo "setup: done. Next:  source .venv/bin/activate   (puts ctrl-hpc on the path of this shell; $(RUN)/ctrl-hpc works without)"
	@echo "              then:  ctrl-hpc doctor   and   ctrl-hpc run configs/tiny.yaml   (or make tiny)"

.venv/.ready: pyproject.toml uv.lock scripts/setup
	scripts/setup
	@touch $@

tiny: .venv/.ready  ## the main job: the whole CTRL pipeline on the CPU (ARGS="seed=1 tiny.rebuild=true")
	$(RUN)/ctrl-hpc run configs/tiny.yaml $(ARGS)

lint: .venv/.ready  ## style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

check: lint  ## lint, types and fast tests (3 minutes at most)
	$(RUN)/pytest $(BESIDE) -m "not slow and not gpu"

test: lint  ## everything: lint, types and all tests (45 minutes at most)
	scripts/setup-tests
	$(RUN)/pytest $(BESIDE) -m "not slow"
	$(RUN)/pytest $(BESIDE) -m "slow and not alone"
	$(RUN)/pytest -m "slow and alone"

docs: .venv/.ready  ## the documentation as a site, in build/site
	$(RUN)/mkdocs build --quiet --strict

clean:  ## remove the environment and caches, keep the runs
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: help setup tiny lint check test docs clean
