"""The benchmark: coloebpf's hooks, the lab, QEMU's colo-compare and a plain bridge, measured with the same frames."""
