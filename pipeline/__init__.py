"""The workflow file, the graph, execution, cache and resume, and the command line."""
