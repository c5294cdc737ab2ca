# Two commands do everything on a fresh Debian 12 machine, as root: `make lab` and `make test`.
VENV := .venv
PY   := $(VENV)/bin/python

.PHONY: help deps deps-test venv lint test lab bench bench-vms stress traffic failovers faults soak vm-test systemd-test pacemaker-test xen-lab deb pictures clean

help:
	@echo "make lab      install what is needed and run the show: two virtual machines in lock-step on this machine"
	@echo "make test     install what is needed, lint, and run all tests (unit, lab, Debian's kernel in QEMU)"
	@echo "make bench    measure every hook and the lab, beside QEMU's colo-compare and a plain bridge"
	@echo "make lint     ruff and mypy only        make vm-test  only the tests in QEMU"
	@echo "make faults   hosts, services, links and arbiters that fail, at random moments   make soak  20 minutes of churn"
	@echo "make deb      the Debian 12 package, in build/"
	@echo "make xen-lab  two Xen hosts in QEMU, and what runs on them (separate: it takes ten minutes)"
	@echo "make clean    remove the venv and caches"

deps:
	deploy/install-deps.sh lab

deps-test:
	deploy/install-deps.sh test

# editable_mode=compat puts this directory on the path, so that a new subpackage needs no new install.
# The stamp is newer than pyproject.toml only if the last install went through.
$(VENV)/.installed: pyproject.toml
	/usr/bin/python3 -m venv --system-site-packages $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat --editable '.[dev,package]'
	touch $@

venv: $(VENV)/.installed

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Recipes, not prerequisites, keep the order (packages, venv, lint, tests) also under make -j.
test:
	$(MAKE) deps-test
	$(MAKE) lint
	$(PY) -m pytest

lab:
	$(MAKE) deps
	$(MAKE) venv
	$(VENV)/bin/coloebpf lab show

bench:
	$(MAKE) deps-test
	$(MAKE) venv
	$(PY) -m tests.bench

# What lock-step costs a server in a virtual machine, beside checkpoints alone.
bench-vms:
	$(MAKE) deps-test
	$(MAKE) venv
	$(PY) -m tests.bench.virtual

# Both CPUs at once, 10 million packets (`make test` has one million).
stress:
	$(MAKE) deps-test
	$(MAKE) venv
	COLO_STRESS_PACKETS=10000000 $(PY) -m pytest tests/lab/test_stress.py

# Real servers and clients at the full sizes of docs/measurements.md; takes long.
traffic:
	$(MAKE) deps-test
	$(MAKE) venv
	COLO_TRAFFIC=full $(PY) -m pytest tests/lab/test_traffic.py

# Two virtual machines through 50 failovers at random moments, 10 changes of roles with connections that are younger than the last checkpoint, and
# 1,000 checkpoints in a row; takes most of an hour.
failovers:
	$(MAKE) deps-test
	$(MAKE) venv
	COLO_FAILOVERS=50 COLO_ROLE_CHANGES=10 COLO_CHECKPOINTS=1000 $(PY) -m pytest tests/lab/test_virtual_failovers.py

# Each fault at each moment, so many times (`make test` has one of each kind); some three seconds each.
faults:
	$(MAKE) deps-test
	$(MAKE) venv
	COLO_FAULT_ROUNDS=$${COLO_FAULT_ROUNDS:-10} $(PY) -m pytest tests/lab/test_faults_matrix.py

# 20 minutes of churn (`make test` has two): memory flat, nothing left over.
soak:
	$(MAKE) deps-test
	$(MAKE) venv
	COLO_SOAK_S=$${COLO_SOAK_S:-1200} $(PY) -m pytest tests/lab/test_soak.py

vm-test:
	$(MAKE) deps-test
	$(MAKE) venv
	$(PY) -m pytest tests/vm

# The unit under a real systemd, in a virtual machine: a few minutes, most of them for one compiler on an emulated CPU.
systemd-test:
	$(MAKE) deps-test
	$(MAKE) venv
	COLO_SYSTEMD=1 $(PY) -m pytest -s tests/vm/test_systemd.py

# A pair under a real Pacemaker and Corosync, on the lab's hosts: some eight minutes (docs/pacemaker.md).
pacemaker-test:
	$(MAKE) deps-test
	$(MAKE) venv
	COLO_PACEMAKER=1 $(PY) -m pytest -s tests/pacemaker

# The package for Debian 12: build/coloebpf_*_all.deb.
deb:
	deploy/install-deps.sh package
	$(MAKE) venv
	deploy/debian/build $(PY)

# Two Xen hosts in QEMU, and the tests on them: with Debian's packages, then with rebuilt ones. By hand: docs/xen-lab.md.
# XEN_SOURCE: the version of the source package to rebuild, where the mirrors have no source of the newest.
xen-lab:
	deploy/install-deps.sh xen-lab
	$(MAKE) venv
	$(PY) -m pytest -s tests/xen
	ls build/xen/*.deb >/dev/null 2>&1 || { deploy/xen/rebuild.sh tools build/xen $(XEN_SOURCE) && deploy/xen/rebuild.sh qemu build/xen; }
	COLO_XEN_DEBS=build/xen $(PY) -m pytest -s tests/xen

# The pictures of the documentation, of docs/pictures/*.dot and a lab.
pictures:
	$(MAKE) deps
	deploy/install-deps.sh pictures
	$(MAKE) venv
	$(PY) docs/pictures/make.py

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
