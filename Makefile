PYTHON ?= python3
# Another release than the one of constraints.txt, in an environment of its own: make test TORCH=2.11.0
TORCH ?=
VENV := $(if $(TORCH),.venv-$(TORCH),.venv)
PIN := $(if $(TORCH),torch==$(TORCH),--constraint constraints.txt)
BIN := $(VENV)/bin
RANKS ?= 2
CHAINS ?= 2000
WORKERS ?= 2

.PHONY: demo test test-unit test-ranks test-procs test-launch hooks walk fuzz lint bench figures gpu memory peers displaced coverage clean autoencoders transformers site drawings release-check serving-check

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]' $(PIN)
	$(BIN)/pip install --quiet --no-deps distrifuser==0.0.1b1  # its modules, for a test; its pins are of 2023
	touch $@

demo: $(VENV)/installed  ## a photograph across two processes, beside tiles, and the plan for eight GPUs
	PROCESSES=$(RANKS) TORCHRUN=$(BIN)/torchrun launch/one_host.sh torchrun_examples/decode_vae.py
	$(BIN)/distpatch plan torchrun_examples/demo_vae --shape 1,16,1024,1024 --world-size 8

test: $(VENV)/installed  ## the whole test suite (TORCH=2.11.0: on that release)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-unit: $(VENV)/installed  ## no ranks, or ranks that do not exist: under a minute
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/unit

test-ranks: $(VENV)/installed  ## ranks as threads of one process
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/ranks

test-procs: $(VENV)/installed  ## ranks as processes
	$(BIN)/python -m pytest tests/procs

test-launch: $(VENV)/installed  ## programs as a user starts them: torchrun, the command line, launchers, benchmarks
	$(BIN)/python -m pytest tests/launch

fuzz: $(VENV)/installed  ## random chains of operations, other ones each time (CHAINS=2000)
	CHAINS=$(CHAINS) $(BIN)/python -m pytest -s --timeout 0 --hypothesis-profile fuzz tests/ranks/test_fuzz.py -k random_chain

lint: $(VENV)/installed  ## style, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

hooks: $(VENV)/installed  ## make lint before every commit
	$(BIN)/pre-commit install

site: $(VENV)/installed  ## the documentation, in out/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "out/site/index.html; to read it: $(BIN)/mkdocs serve"

figures: $(VENV)/installed  ## every figure of the documents, measured again and written into its page (about an hour)
	$(BIN)/python -m benchmarks.figures

drawings: $(VENV)/installed  ## docs/drawings/*.svg
	$(BIN)/python docs/drawings.py

release-check: $(VENV)/installed  ## wheel and sdist: built, checked, installed with each extra and tried (minutes)
	.ci/release-check

serving-check: $(VENV)/installed  ## the plug-ins of vLLM-Omni and SGLang against the packages themselves (minutes)
	.ci/serving-check

coverage: $(VENV)/installed  ## docs/coverage.md, from the table of rules
	$(BIN)/python docs/coverage.py > docs/coverage.md

walk: $(VENV)/installed  ## docs/walk.md: the files and functions that a convolution goes through
	$(BIN)/torchrun --standalone --nproc_per_node=2 docs/walk.py > docs/walk.md

bench: $(VENV)/installed  ## the decoder, the rules, planned and measured (docs/benchmarks.md)
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.scaling --plot docs/scaling.png

gpu: $(VENV)/installed  ## all that one GPU, or several, can show in eight minutes; small on a CPU
	mkdir -p out
	$(BIN)/python -m benchmarks.gpu --json out/gpu.json

memory: $(VENV)/installed  ## peak memory beside the peers', and docs/memory.png (about an hour)
	mkdir -p out
	$(BIN)/python -m benchmarks.memory $(addprefix --conv-size ,256 512 1024 2048) \
		$(addprefix --decode-size ,256 512 1024) --json out/memory.json --plot docs/memory.png

peers: $(VENV)/installed  ## time, memory and error beside the peers', and docs/peers.png (twenty minutes)
	mkdir -p out
	$(BIN)/python -m benchmarks.peers --install
	$(BIN)/python -m benchmarks.peers --size 512 --rounds 3 --json out/peers.json --plot docs/peers.png

autoencoders: $(VENV)/installed  ## every autoencoder of diffusers, converted, against one device
	$(BIN)/python -m benchmarks.autoencoders

transformers: $(VENV)/installed  ## every diffusion transformer of diffusers, converted, against one device
	$(BIN)/python -m benchmarks.transformers

displaced: $(VENV)/installed  ## displaced steps: PSNR by policy, time with delayed messages, bytes
	$(BIN)/python -m benchmarks.displaced.train_denoiser
	$(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) -m benchmarks.displaced quality
	$(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) -m benchmarks.displaced hidden
	$(BIN)/python -m benchmarks.displaced.train_denoiser --model transformer --seconds 150
	$(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) -m benchmarks.displaced quality --model transformer --side 128
	$(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) -m benchmarks.displaced hidden --model transformer

clean:
	rm -rf $(VENV) build dist *.egg-info out
