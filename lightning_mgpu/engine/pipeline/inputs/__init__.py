"""Split the arguments of a call into those of its micro-batches."""
