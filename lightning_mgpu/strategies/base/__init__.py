"""Base classes of the strategies."""
