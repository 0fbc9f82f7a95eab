"""The options of a sweep, checked before anything starts."""
