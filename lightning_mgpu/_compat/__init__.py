"""Private and version-dependent names of other packages, each behind a name of ours."""
