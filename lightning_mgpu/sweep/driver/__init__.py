"""Code of the process that leads a sweep."""
