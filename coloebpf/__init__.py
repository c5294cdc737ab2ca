"""coloebpf: non-stop service for Xen guests, with COLO's output comparison in eBPF."""

__version__ = "0.1.0"
