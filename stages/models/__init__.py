"""Model families: how a network is taken apart into blocks and units, and how its checkpoint is read."""
