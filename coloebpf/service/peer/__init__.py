"""The two services' link over the management network: certificates, messages, the connection."""
