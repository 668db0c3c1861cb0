# Two commands do everything on a fresh Debian-like machine with Rust, Python 3 and Java:
#   make demo    installs what is missing, builds, and shows the whole loop
#   make test    installs what is missing, and runs all tests against a real Kafka, Redis and schema registry
.PHONY: demo test lint build bench bench-peers setup clean help
export DRIFTLINE_PYTHON ?= $(CURDIR)/.venv/bin/python

help:
	@sed -n 's/^#   /  /p' Makefile

demo:
	@scripts/setup demo
	@echo "building driftline (the first build takes some minutes; later ones seconds)"
	@cargo build --release --locked
	@./target/release/driftline demo

test:
	@scripts/setup test
	cargo test --release --locked --features failpoints

lint:
	@scripts/setup build
	cargo fmt --check
	cargo clippy --release --locked --all-targets --features failpoints -- -D warnings
	@scripts/deny

build:
	@scripts/setup build
	cargo build --release --locked

bench:
	@scripts/setup test
	cargo bench

# Emitted windows beside Apache Flink, on the same events and broker (some minutes; fetches Flink's jars).
bench-peers:
	@scripts/setup test
	cargo build --release --locked
	.venv/bin/python benches/peers/compare.py

clean:
	cargo clean
	rm -rf .servers .venv data
