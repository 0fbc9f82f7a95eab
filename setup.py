"""Which packages to ship; everything else is in `pyproject.toml`."""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["lightning_mgpu", "lightning_mgpu.*"]),
        "lightning_mgpu.conf",  # `conf/`, by package-dir in pyproject.toml
        # With the namespace itself, so that Hydra finds plugins of an editable install, too.
        *find_namespace_packages(
            include=["hydra_plugins", "hydra_plugins.*"], exclude=["*.__pycache__"]
        ),
    ]
)
