"""Runs on a Ray cluster.

`connection.py` and `tokens.py` are its door, `jobs.py` what its dashboard knows of jobs. `handover.py` makes a job of a
run, from what `shipping.py` packs, and keeps a `submission.py` of it; `driver.py` is what that job runs, `liveness.py`
says how it fares, and `terminal.py` shows it. `kuberay.py` writes the same for a cluster that does not exist yet.
"""
