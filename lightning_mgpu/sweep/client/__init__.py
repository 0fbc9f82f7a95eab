"""Submit a sweep from outside the cluster, through Ray Client.

`laptop` has the `head` of the cluster run the same command, `sweep.job.submitted` tells that
process what is different there; at the end `download` copies the `files` to the laptop.
"""
