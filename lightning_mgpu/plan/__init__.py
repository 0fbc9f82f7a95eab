"""What a pipeline would take, predicted from a rehearsal on one device: `mode=plan`.

`options` is what is asked for, `rehearsal` and `bench` measure, `profile` holds what they have
measured, `predict` makes rows of it, `show` prints and writes them.
"""
