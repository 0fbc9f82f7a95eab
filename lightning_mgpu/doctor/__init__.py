"""Examine the installation and the machine: `mode=doctor`.

`finding` is what checks say; `versions`, `machine`, `storage`, `network`, `devices`, `ranks` and
`setup` are the checks, by what they look at; `apart` runs one in a process of its own and `runner`
all of them; `report` prints and writes; `command` is the whole.

Only checks that run apart import torch, Lightning or Ray: a broken one is a finding.
"""
