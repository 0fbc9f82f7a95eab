"""Which packages to ship; everything else is in `pyproject.toml`."""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["lightning_mgpu", "lightning_mgpu.*"]),
        "lightning_mgpu.conf",  # `conf/`, by package-dir in pyproject.toml
        *find_namespace_packages(include=["hydra_plugins.*"], exclude=["*.__pycache__"]),
    ]
)
