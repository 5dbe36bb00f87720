"""`export`: folders that other tools load."""
