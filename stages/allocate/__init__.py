"""`allocate`: budgets into allocations; what stands between a database and the solvers."""
