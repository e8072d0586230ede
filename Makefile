# Targets for people; `make help` lists them. Only Go, git and make have to be
# there already.

GO ?= go
export CGO_ENABLED ?= 0

INIT    := internal/kernel/agent/ironclaw-init
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS := -s -w -X github.com/ironclaw-run/ironclaw/internal/cli.Version=$(VERSION)

.PHONY: help build demo test test-fast boots lab lab-shell lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 16

build: ## build bin/ironclaw, guest agent included
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $(INIT) ./cmd/ironclaw-init
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ironclaw ./cmd/ironclaw

demo: ## install what is missing, build, and run a real job in a micro-VM
	@scripts/install-packages run
	@$(MAKE) --no-print-directory build
	@demo/run

test: ## all tests, on real machines too
	@scripts/install-packages test
	@$(MAKE) --no-print-directory build
	bin/ironclaw setup
	IRONCLAW_TEST_VM=1 IRONCLAW_TEST_NET=1 CGO_ENABLED=1 $(GO) test -race -count=1 -timeout 20m ./...

test-fast: ## the tests that boot no machine
	$(GO) test ./...

boots: build ## boot N machines in a row (N=100)
	@scripts/boots $(or $(N),100)

lab: ## the tests of KVM and vsock, in an emulated machine (LAB_RUN=REGEXP: those)
	@scripts/install-packages lab
	@$(MAKE) --no-print-directory build
	@lab/run

lab-shell: ## a root shell in that machine
	@scripts/install-packages lab
	@$(MAKE) --no-print-directory build
	@lab/run shell

lint: ## gofmt, vet, staticcheck and the house rules
	@test -z "$$(gofmt -l $$(git ls-files '*.go') | tee /dev/stderr)"
	$(GO) vet ./...
	$(GO) tool -modfile=tools/go.mod staticcheck ./...
	$(GO) mod tidy -diff
	$(GO) test ./internal/house

bench: ## measure starts, round trips and throughput (BENCH="density -n 100")
	@scripts/install-packages bench
	@$(MAKE) --no-print-directory build
	bin/ironclaw setup
	bin/ironclaw bench $(BENCH)

clean: ## remove what was built here (not kernels and images)
	rm -rf bin $(INIT)
