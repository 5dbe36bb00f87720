"""`latency` and `speed`: what levels and whole models take on a machine."""
