"""The checks of `coloebpf doctor`, a file for each part of the world that they look at."""
