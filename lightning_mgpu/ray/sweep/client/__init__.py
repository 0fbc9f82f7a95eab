"""Sweeps that a laptop sends to a cluster, of which it is no part, by Ray Client.

`laptop` has the `head` of the cluster run the same command, and `sent` tells that process what is
different there; at the end `download` copies the `files` of the sweep to the laptop.
"""
