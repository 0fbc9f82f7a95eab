"""What runs in the process that leads a sweep."""
