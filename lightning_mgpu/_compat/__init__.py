"""Private and version-dependent names of other packages, each used here and nowhere else.

One file for each package, and a test of each name (`tests/compat`) that says what is gone when a
new release comes. This file imports nothing.
"""
