# Two commands matter: `make demo` and `make test`. Each sets up what it needs, on Debian 12 with Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := .venv-vllm
GPU := .venv-gpu
HELM := .cache/helm
SEED ?= 1
ENGINE ?= podman
VARIANT ?= cpu
BASE ?=

.PHONY: help setup demo seeds test test-fast test-vllm test-gpu bench-gpu lint chart compile micro locks images demo-containers test-images clean
help:            ## List the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## Virtual environment with pinned packages
$(READY): pyproject.toml constraints.txt scripts/setup.sh
	bash scripts/setup.sh "$(PYTHON)" $(VENV)

demo: $(READY)   ## Recover the micro example through the compiled pipeline, on this machine
	$(BIN)/python -m pipelines.local recipes/micro.toml --set seed=$(SEED)

seeds: $(READY)  ## The README's table: the demo's recovery over three seeds
	$(BIN)/python benchmarks/micro_seeds.py --seeds 1 2 3

test: $(READY) $(HELM)/.ready lint  ## Every test, with a real S3 server and a real MLflow server
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(READY) $(HELM)/.ready  ## The tests that need no server and take seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-vllm: $(READY) $(VLLM)/.ready  ## The vLLM engine for real, on CPU, in an environment of its own (Python 3.11)
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m pytest tests/test_vllm_*.py
	$(BIN)/python -m pytest tests/integration/test_vllm_stages.py
$(VLLM)/.ready: pyproject.toml requirements-vllm.txt scripts/setup_vllm.sh
	bash scripts/setup_vllm.sh "$(PYTHON)" $(VLLM)

test-gpu: $(GPU)/.ready  ## The tests marked gpu, on a machine with a CUDA GPU, in an environment of its own
	$(GPU)/bin/python -m pytest tests/gpu
bench-gpu: $(GPU)/.ready  ## What an update and the loss take on this GPU: benchmarks/results/gpu.md, in eight minutes
	$(GPU)/bin/python benchmarks/gpu.py --minutes 8
$(GPU)/.ready: pyproject.toml constraints.txt scripts/setup_gpu.sh
	bash scripts/setup_gpu.sh "$(PYTHON)" $(GPU)

lint: $(READY)   ## Style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

chart: $(READY) $(HELM)/.ready  ## The chart's README from its values, then lint, templates, strict manifests, and all its tests
	$(BIN)/python scripts/chart_readme.py
	$(HELM)/helm lint --strict helm/camopd
	$(BIN)/python -m pytest tests/helm
$(HELM)/.ready: scripts/setup_helm.sh | $(READY)
	bash scripts/setup_helm.sh $(BIN)/python $(HELM)

compile: $(READY)  ## Write pipelines/recovery.yaml again
	$(BIN)/python -m pipelines.compile -o pipelines/recovery.yaml

micro: $(READY)  ## Make the models, prompts and tasks of examples/micro from nothing
	$(BIN)/python examples/micro/make.py

locks: $(READY)  ## Write the images' locks again, after a change in constraints.txt or requirements-vllm.txt
	$(BIN)/python -m images.lock

images: $(READY)  ## Build core, trainer and inference with podman (docs/containers.md): BASE=debootstrap, VARIANT=cuda, ENGINE=docker
	@[ "$(ENGINE)" != podman ] || bash scripts/setup_podman.sh
	$(BIN)/python -m images.build --base "$(BASE)" --variant $(VARIANT) --engine $(ENGINE)

demo-containers: $(READY)  ## `make demo` in containers of the images, as a cluster would run them
	$(BIN)/python -m pipelines.local recipes/micro.toml --containers --set output=runs/containers --set seed=$(SEED)

test-images: $(READY)  ## What is in the built images, and that the pipeline runs in them
	CAMOPD_TEST_IMAGES=1 $(BIN)/python -m pytest -m images

clean:           ## Remove what the targets above wrote, the environment included
	rm -rf $(VENV) $(VLLM) $(GPU) runs .cache build dist
