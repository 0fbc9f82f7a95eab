"""Join what the micro-batches return into what the whole batch would have."""
