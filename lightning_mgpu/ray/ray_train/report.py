"""Report to Ray Train at the end of each epoch, and remove temporary files."""

import shutil
from typing import Any

from ray.train.lightning import RayTrainReportCallback
from typing_extensions import override

from lightning_mgpu._compat.ray import report_directory


class TrainReportCallback(RayTrainReportCallback):
    """Remove the directory in which checkpoints waited to be stored."""

    @override
    def teardown(self, *_: Any, **__: Any) -> None:
        shutil.rmtree(report_directory(self), ignore_errors=True)

    @override
    def on_exception(self, *_: Any, **__: Any) -> None:
        self.teardown()
