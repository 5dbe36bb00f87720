"""The Parquet store: schemas, append, query, frontier."""
