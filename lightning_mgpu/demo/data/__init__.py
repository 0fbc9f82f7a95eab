"""Data for the demo models; what a set needs beyond torch is imported only when it is used."""

from lightning_mgpu.demo.data.cifar10 import CIFAR10
from lightning_mgpu.demo.data.digits import Digits
from lightning_mgpu.demo.data.synthetic import Synthetic

__all__ = ["CIFAR10", "Digits", "Synthetic"]
