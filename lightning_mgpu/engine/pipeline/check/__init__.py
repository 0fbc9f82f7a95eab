"""Check on the first batch that micro-batches compute what the whole batch does."""
