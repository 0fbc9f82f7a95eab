"""Predict time and memory of pipelines from measurements on one device: `mode=plan`.

`options` is what is asked for; `rehearsal`, `bench` and `turn` measure; `profile` holds what they
have measured, `stages` what stages made of it take; `predict` makes rows of that with
the engine's `simulate`; `show` prints and writes them; `command` is the whole.
"""
