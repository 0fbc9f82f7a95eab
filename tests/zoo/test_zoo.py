"""Models that others wrote, against one device: weights, metrics, outputs and predictions."""

from typing import Any

import pytest
import zoo
from rows import ROWS
from zoo import Row

from lightning_mgpu import DataParallelStrategy

pytestmark = pytest.mark.slow
WEIGHTS = 1e-9


def _id(row: Row) -> str:
    return row.make.partition("_")[2]


def _case(row: Row) -> zoo.Case:
    pytest.importorskip(row.package.replace("-", "_"), reason="needs the extra `zoo` (`make zoo`)")
    return row.case()


def _assert_equal(actual: zoo.Result, expected: zoo.Result, tolerance: float) -> None:
    assert not zoo.differences(actual.weights, expected.weights, WEIGHTS)
    assert not zoo.differences(actual.metrics, expected.metrics, tolerance)
    assert not zoo.differences(actual.outputs, expected.outputs, tolerance)
    assert not zoo.differences(actual.predictions, expected.predictions, tolerance)


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("row", ROWS, ids=_id)
def test_dp(row: Row, devices: int, caplog: Any) -> None:
    case = _case(row)
    expected = zoo.one_device(row)
    strategy = DataParallelStrategy()
    actual = zoo.run(case, strategy, devices, zoo.Samples(case))
    print("WARN", caplog.text)
    if row.dp == "equal":
        _assert_equal(actual, expected, case.tolerance)
        return
    assert zoo.differences(actual.weights, expected.weights, WEIGHTS)
    if row.dp == "equal with advice":
        advised = DataParallelStrategy(**case.advice)
        _assert_equal(zoo.run(case, advised, devices, zoo.Samples(case)), expected, case.tolerance)


@pytest.mark.parametrize("row", ROWS, ids=_id)
def test_ddp(row: Row) -> None:
    case = _case(row)
    expected = zoo.averaged_gradients(row)
    data = zoo.Samples(case, zoo.BATCH // zoo.RANKS, "ranks")
    actual = zoo.run(case, "mgpu_ddp", zoo.RANKS, data)
    assert not zoo.differences(actual.weights, expected.weights, WEIGHTS)
