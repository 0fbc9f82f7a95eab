"""Files of a sweep: journal, results, and the state for resuming."""
