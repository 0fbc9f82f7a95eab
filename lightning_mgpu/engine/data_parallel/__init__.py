"""Copies of a module, one per device, synchronised with their master.

`copying` makes the copies, `replicas` runs steps on all of them, `side_effects` brings what a step
has changed back to the master, and `loss` makes one loss of theirs.
"""
