"""Runs on a Ray cluster: its door, what is handed over, the jobs that it makes of them, and how they fare."""
