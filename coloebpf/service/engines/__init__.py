"""Engines: what makes checkpoints, one file each (coloebpf.service.engine says what one is)."""
