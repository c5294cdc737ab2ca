"""The service that runs on each host, on top of the dataplane."""
