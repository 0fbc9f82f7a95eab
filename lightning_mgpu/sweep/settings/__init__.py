"""Check the options of a sweep before anything starts."""
