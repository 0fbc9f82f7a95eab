"""The default task: small classifiers and the data to train them on.

Configs name these classes by `_target_`; nothing else in the package imports them.
"""
