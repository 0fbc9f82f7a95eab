"""Make our strategies known by name in every Hydra application.

Hydra imports this file at its start, and the strategies are registered once Lightning is imported:
neither torch nor Lightning is imported here.
"""

from lightning_mgpu._registration import register

register()
