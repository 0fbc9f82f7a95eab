"""What is used of torchmetrics beside its documentation."""

import torch
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

from lightning_mgpu._compat.torchmetrics import note_updates, reductions_of


def test_reductions_are_functions_by_the_state() -> None:
    assert reductions_of(SumMetric()) == {"sum_value": dim_zero_sum}
    assert reductions_of(MeanMetric()) == {"mean_value": dim_zero_sum, "weight": dim_zero_sum}
    assert len({dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum}) == 4


def test_note_updates_counts_them_and_forgets_what_was_computed() -> None:
    metric = SumMetric()
    metric.update(1.0)
    assert metric.compute() == 1
    metric.sum_value += torch.tensor(2.0)
    assert metric.compute() == 1  # it is remembered
    note_updates(metric, 3)
    assert metric.compute() == 3
    assert metric.update_count == 4


def test_note_updates_counts_the_first() -> None:
    metric = SumMetric()
    note_updates(metric, 1)
    assert metric.update_called
    metric.reset()
    assert metric.update_count == 0
