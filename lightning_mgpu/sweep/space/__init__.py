"""What is searched, and for what: dimensions and objectives."""
