"""What the benchmark can't do, in one sentence."""

from coloebpf.errors import ColoError


class BenchError(ColoError):
    """A part of the benchmark could not be set up or run."""
