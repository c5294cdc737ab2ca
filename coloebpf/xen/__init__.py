"""Xen: libxl by ctypes in a process of its own, what a guest must be to be copied, what its NICs are behind."""
