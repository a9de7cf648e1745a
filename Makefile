# make demo   install, fuse two digit classifiers, print a table and where the report lies
# make test   install with the test extras, lint, run the suite
# make docs   install with mkdocs, build the pages into site/
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := slimfuse export tests benchmarks docs

.PHONY: demo test suite lint format install install-test bench-digits bench-fashion-mnist \
	bench-nets bench-scale bench-methods bench-equal-width bench-knowledge bench-halves \
	bench-widths bench-depth bench-embedding bench-smollm2 bench-wordnet bench-stream-maps bench-saliency-cost \
	bench-unstructured bench-structured bench-saliency-fusion bench-sparse-onnx bench-shipped \
	bench-distillation bench-sweep bench-processes bench-protect bench-trends bench-deployment \
	bench-serving bench-spectral-budget bench-mixed-precision \
	bench-diagnose bench-peers bench-quality bench-exponents bench-efficiency bench-latency docs \
	fuzz clean

demo: install
	$(BIN)/slimfuse compress recipes/vit/digits.yaml

# both at once: mypy needs most of a minute of one core
test: install-test
	$(MAKE) -j 2 lint suite

# a file's tests stay in one process, which makes their fixtures once; one thread in each;
# the longest files are the first (tests/conftest.py)
suite: install-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install-test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/mypy docs/*.py

format: install-test
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# into site/, without network; the recipe reference is written anew
docs: install
	$(PIP) install -c constraints.txt -e ./export -e '.[docs]'
	$(BIN)/python docs/reference.py
	$(BIN)/mkdocs build --strict -q

bench-methods: install
	$(BIN)/python benchmarks/methods.py

bench-equal-width: install
	$(BIN)/python benchmarks/equal_width.py

bench-knowledge: install
	$(BIN)/python benchmarks/knowledge.py

bench-widths: install
	$(BIN)/python benchmarks/widths.py

bench-halves: install
	$(BIN)/python benchmarks/halves.py

bench-wordnet: install
	$(BIN)/python benchmarks/wordnet.py

bench-stream-maps: install
	$(BIN)/python benchmarks/stream_maps.py

bench-embedding: install
	$(BIN)/python benchmarks/embedding.py

bench-saliency-cost: install
	$(BIN)/python benchmarks/saliency_cost.py

bench-unstructured: install
	$(BIN)/python benchmarks/unstructured.py

bench-sparse-onnx: install
	$(BIN)/python benchmarks/sparse_onnx.py

bench-distillation: install
	$(BIN)/python benchmarks/distillation.py

bench-shipped: install
	$(BIN)/python benchmarks/shipped.py

bench-trends: install
	$(BIN)/python benchmarks/trends.py

bench-protect: install
	$(BIN)/python benchmarks/protect.py

bench-processes: install
	$(BIN)/python benchmarks/processes.py

bench-spectral-budget: install
	$(BIN)/python benchmarks/spectral_budget.py

bench-mixed-precision: install
	$(BIN)/python benchmarks/mixed_precision.py

bench-diagnose: install
	$(BIN)/python benchmarks/diagnose.py

bench-quality: install
	$(BIN)/python benchmarks/quality.py

# each package in an environment of its own, under runs/
bench-peers: install
	$(BIN)/python benchmarks/peers_survey.py

bench-exponents: install
	$(BIN)/python benchmarks/exponents.py

bench-efficiency: install
	$(BIN)/python benchmarks/efficiency.py

bench-latency: install
	$(BIN)/python benchmarks/latency.py

bench-deployment: install
	$(BIN)/python benchmarks/deployment.py

bench-structured: install
	$(BIN)/python benchmarks/structured.py

bench-saliency-fusion: install
	$(BIN)/python benchmarks/saliency_fusion.py

bench-serving: install
	$(PIP) install -c constraints.txt -e './export[serve]'
	$(BIN)/python benchmarks/serving.py

bench-sweep: install
	$(BIN)/python benchmarks/sweep.py

bench-smollm2: install
	$(BIN)/python benchmarks/smollm2.py

bench-depth: install
	$(BIN)/python benchmarks/depth.py

bench-scale: install
	$(BIN)/python benchmarks/scale.py

bench-nets: install
	$(BIN)/python benchmarks/nets.py

fuzz: install
	$(BIN)/python benchmarks/fuzz.py

bench-digits: install
	$(BIN)/python benchmarks/digits.py

bench-fashion-mnist: install
	$(BIN)/python benchmarks/fashion_mnist.py

install: .venv/.installed
install-test: .venv/.installed-test

.venv/.created:
	$(PYTHON) -c 'import sys; sys.exit("slimfuse needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	touch $@

# torch first and pinned: an unpinned one brings gigabytes of CUDA packages
.venv/.installed: .venv/.created constraints.txt pyproject.toml export/pyproject.toml
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ./export -e .
	@if $(PIP) list 2>/dev/null | grep -iE '^(nvidia|triton)'; then \
	  echo "CUDA packages were installed: point pip at an index with the CPU build of torch," \
	       "remove .venv and try again"; exit 1; fi
	touch $@

.venv/.installed-test: .venv/.installed
	$(PIP) install -c constraints.txt -e ./export -e '.[test]'
	touch $@

clean:
	rm -rf .venv runs site .pytest_cache .mypy_cache .ruff_cache
