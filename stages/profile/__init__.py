"""`profile`: how much each level of each unit hurts."""
