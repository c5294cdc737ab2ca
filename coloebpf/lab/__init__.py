"""The one-machine lab: both hosts, a client and two replica guests, made of network namespaces."""
