"""Search space and objectives."""
