"""Search algorithms, schedulers for early stopping, and the end of a search."""
