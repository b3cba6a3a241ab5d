# Everything runs with PYTHON, 3.8 or later; only the tests need a package, pytest, in an environment of their own.
PYTHON ?= python3
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
BENCH ?= ../shared/bench/bench.py

.PHONY: help demo run test soak bench toc clean

help:  ## List the targets
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' Makefile

demo:  ## Try the proxy without a key or a network
	$(PYTHON) ollama_proxy.py demo

run:  ## Serve, with the settings of the environment and .env
	$(PYTHON) ollama_proxy.py

test: $(VENV)/ready  ## Run the tests
	$(VENV)/bin/python -m pytest -q -k "not soak" -p no:cacheprovider test_ollama_proxy.py

soak: $(VENV)/ready  ## Run the slow tests: thousands of aborted requests, gigabytes
	$(VENV)/bin/python -m pytest -q -k soak -p no:cacheprovider test_ollama_proxy.py

bench:  ## Measure beside nginx and the direct connection (BENCH names the benchmark)
	@test -x $(BENCH) || { echo "make: $(BENCH) is not there; BENCH=... names the streaming-proxy benchmark"; exit 1; }
	$(BENCH) --markdown --launch "ours=env OLLAMA_API_KEY=k PROXY_UPSTREAMS=cloud={upstream} PROXY_PORT={port} {python} '$(CURDIR)/ollama_proxy.py'"

toc:  ## List the file's sections
	@grep -n '^# ---- ' ollama_proxy.py

clean:  ## Remove what the other targets made
	rm -rf .venv-* __pycache__ .pytest_cache

$(VENV)/ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 8))' || { echo "make: '$(PYTHON)' is not there or older than Python 3.8; say PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) cannot make environments; install its venv module (Debian: apt-get install python3-venv)"; exit 1; }
	@command -v openssl >/dev/null || { echo "make: the tests need the openssl command (Debian: apt-get install openssl)"; exit 1; }
	@command -v curl >/dev/null || { echo "make: the tests need curl (Debian: apt-get install curl)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check pytest || { rm -rf $(VENV); echo "make: pytest could not be installed from PyPI, see above"; exit 1; }
	@touch $@
