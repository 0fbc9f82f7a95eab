"""Copies of a module, one per device, kept in step with their master.

`structure` finds a module's parts, `remap` translates references to them, `master` and `copies` are
the `replica` of each slot, `replicas` puts them together, and `loss` their losses.
"""
