"""Pictures of what runs have left in files: no torch, no Trainer, only what is on disk.

The libraries that draw come with the extra `report` and are imported where they are used.
"""
