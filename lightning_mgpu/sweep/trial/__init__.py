"""Code of the process of a trial."""
