"""A run, from its plan to what became of it: what it makes, who drives it, what it says, how it ends."""
