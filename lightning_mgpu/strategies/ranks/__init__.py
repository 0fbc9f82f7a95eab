"""Launch the ranks of `ddp`, distribute samples to them and collect predictions."""
