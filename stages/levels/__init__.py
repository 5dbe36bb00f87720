"""Levels: compressed variants of units, the database that keeps them, and how kernels take them."""
