"""Models that others wrote, against one device: weights, metrics, outputs and predictions."""

import logging
from typing import Any

import pytest
import torch
import zoo
from rows import ROWS
from zoo import Row

from lightning_mgpu import DataParallelStrategy, DDPStrategy, PipelineDDPStrategy, PipelineStrategy

pytestmark = pytest.mark.slow
WEIGHTS = 1e-9
WITH_RANKS = {"zoo_text.bert_loss_in_step", "zoo_text.llama", "zoo_images.timm_resnet"}
SAID = "gives different results on"


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


def _ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we have warned of."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("lightning_mgpu")
    ]


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("row", ROWS, ids=_id)
def test_dp_is_one_device_or_says_what_to_do(
    row: Row, devices: int, caplog: pytest.LogCaptureFixture
) -> None:
    case = _case(row)
    expected = zoo.one_device(row)
    actual = zoo.run(case, "dp", devices, zoo.Samples(case))
    warned = any(SAID in message for message in _ours(caplog))
    if row.dp == "pass":
        assert not _ours(caplog)
        _assert_equal(actual, expected, case.tolerance)
        return
    assert warned == (row.dp != "differs")
    assert zoo.differences(actual.weights, expected.weights, WEIGHTS)
    if row.dp == "needs advice":
        caplog.clear()
        advised = DataParallelStrategy(**case.advice)
        actual = zoo.run(case, advised, devices, zoo.Samples(case))
        assert not _ours(caplog)
        _assert_equal(actual, expected, case.tolerance)


@pytest.mark.parametrize(("stages", "deferred"), [(2, "auto"), (3, "auto"), (2, True)])
@pytest.mark.parametrize("row", ROWS, ids=_id)
def test_pipeline_is_one_device_or_says_what_to_do(
    row: Row, stages: int, deferred: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With all gradients of weights deferred as well, which small models are spared."""
    case = _case(row)
    expected = zoo.one_device(row)
    if row.pipeline == "refused":
        with pytest.raises(ValueError, match="`" + "|`".join(case.pipeline_advice)):
            zoo.run(case, "pipeline", stages, zoo.Samples(case))
        options = case.pipeline_advice
    else:
        options = {}
    strategy = PipelineStrategy(defer_weight_gradients=deferred, **options)
    actual = zoo.run(case, strategy, stages, zoo.Samples(case))
    assert not _ours(caplog)
    if row.pipeline == "differs":
        assert zoo.differences(actual.weights, expected.weights, WEIGHTS)
        return
    _assert_equal(actual, expected, case.tolerance)


@pytest.mark.parametrize("row", [row for row in ROWS if row.make in WITH_RANKS], ids=_id)
def test_pipeline_ddp_averages_gradients(row: Row) -> None:
    case = _case(row)
    expected = zoo.averaged_gradients(row)
    strategy = PipelineDDPStrategy(stages=2)
    devices = zoo.RANKS * 2
    actual = zoo.run(case, strategy, devices, zoo.Samples(case, zoo.SHARE, "ranks"))
    assert not zoo.differences(actual.weights, expected.weights, WEIGHTS)


@pytest.mark.parametrize("row", ROWS, ids=_id)
def test_mgpu_ddp_averages_gradients(row: Row) -> None:
    case = _case(row)
    expected = zoo.averaged_gradients(row)
    if row.ddp == "needs advice":
        with pytest.raises(RuntimeError, match="parameters that were not used"):
            zoo.run(case, "mgpu_ddp", zoo.RANKS, zoo.Samples(case, zoo.SHARE, "ranks"))
    strategy = DDPStrategy(**case.ddp_advice)
    actual = zoo.run(case, strategy, zoo.RANKS, zoo.Samples(case, zoo.SHARE, "ranks"))
    trained = {name for name, _ in case.build().named_parameters()}
    # Batch normalisation follows rank 0, as under Lightning's DDP.
    frozen = row.dp != "differs"
    ours, theirs = (
        {name: value for name, value in result.weights.items() if frozen or name in trained}
        for result in (actual, expected)
    )
    assert not zoo.differences(ours, theirs, WEIGHTS)


def test_dp_merges_the_statistics_of_batch_normalisation() -> None:
    """The first layer sees the same on one device; the others see what each shard makes of it."""
    row = next(row for row in ROWS if row.dp == "differs")
    case = _case(row)
    results = [
        zoo.run(case, strategy, devices, zoo.Samples(case), steps=1).weights
        for strategy, devices in (("auto", 1), ("dp", 3))
    ]
    alone, parallel = (
        [value for name, value in weights.items() if "running_" in name][:2] for weights in results
    )
    torch.testing.assert_close(parallel, alone, rtol=0, atol=1e-9)
