"""`evaluate`: the scoring of candidates and models, for searches and for reports."""
