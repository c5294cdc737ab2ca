"""Runs commands under Debian 12's own kernel, in QEMU."""
