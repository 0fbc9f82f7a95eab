"""Actor that runs trials, each of which is one Hydra job.

The driver of a sweep imports this as well; what needs torch is imported by the actors alone.
"""

import gc
import os
import pickle
from typing import Any

from ray.tune import PlacementGroupFactory
from typing_extensions import override

from lightning_mgpu._compat.namespace import preload
from lightning_mgpu._compat.ray_tune import TrialActor
from lightning_mgpu.launch.main_script import MainScriptError
from lightning_mgpu.sweep.job.nested import marked
from lightning_mgpu.sweep.trial.failures import TrialFailedError
from lightning_mgpu.sweep.trial.resources import request
from lightning_mgpu.sweep.trial.signals import forget_handlers, ignore_handlers
from lightning_mgpu.sweep.trial.tracking import run_group
from lightning_mgpu.sweep.trial.trial_plan import TrialPlan

# How long a trial that was stopped may take to end before its process is given up.
END_SECONDS = 600
# How long one may train on to its next report, which tells it to stop, when the sweep ends.
_REPORT_SECONDS = 60
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


class HydraTrial(TrialActor):
    """Run a trial on a thread of its actor, and the next one afterwards.

    Attributes:
        payload: The pickled `TrialPlan` of the sweep.
        hides_gpus: Whether trials see no GPU. Ray itself shows all of them to actors without one.
    """

    payload = b""
    hides_gpus = False
    _why_not: str | None = None

    @classmethod
    def of(cls, plan: TrialPlan, hides_gpus: bool) -> type["HydraTrial"]:
        """Make the trainable of a sweep."""
        return cls.named("HydraJob", "hydra", payload=plan.dumps(), hides_gpus=hides_gpus)

    @classmethod
    @override
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory | None:
        return request(config)

    @override
    def setup(self, config: dict[str, Any]) -> None:
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(END_SECONDS)
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        if self.hides_gpus:
            os.environ.update(dict.fromkeys(_VISIBLE, ""))
        gc.disable()  # collecting garbage while importing costs a third of the time
        try:
            threads, sweep_dir, state, plan = pickle.loads(self.payload)
            preload(state.namespace)  # its loggers are then there before the first trial
            from lightning_mgpu.sweep.trial.actor_reset import ActorReset, adopt
            from lightning_mgpu.sweep.trial.launchers import take_over_launches

            take_over_launches()
            ignore_handlers()
            # Marked before the main script is imported, or one without a guard would sweep.
            variables = run_group(sweep_dir, state.environment, state.directory)
            variables |= marked(self._number, sweep_dir)
            state = adopt(state, threads, variables)
            state.apply()
            self._plan: TrialPlan = pickle.loads(plan)
            self._scrubber = ActorReset(state)
        except MainScriptError as error:
            self._why_not = str(error)  # an error here would look as if the process had died
        finally:
            gc.enable()
        super().setup(config)  # type: ignore[no-untyped-call]

    @property
    def _number(self) -> int:
        return int(self.directory_name or 0)

    @override
    def reset_config(self, new_config: dict[str, Any]) -> bool:
        if super().reset_config(new_config):  # type: ignore[no-untyped-call]
            return True
        # Ray tells nobody of a trial whose actor just says no.
        raise TrialFailedError(
            f"the previous trial in this process did not stop within {END_SECONDS} s. With"
            " hydra.sweeper.reuse_actors=false each trial has its own process."
        )

    @override
    def cleanup(self) -> None:
        from lightning_mgpu.sweep.trial import reporting

        # Ray itself would end the process at once, in the middle of a checkpoint perhaps.
        self.finish(_REPORT_SECONDS)
        if reporting.is_stopped():
            self.finish(END_SECONDS - _REPORT_SECONDS)
        super().cleanup()  # type: ignore[no-untyped-call]

    @override
    def run(self, config: dict[str, Any]) -> None:
        from lightning_mgpu.sweep.trial.run_trial import run_trial

        if self._why_not is not None:
            raise TrialFailedError(self._why_not)
        self._scrubber.before()
        os.environ.update(marked(self._number, self._plan.sweep_dir))
        forget_handlers()
        try:
            run_trial(self._plan, config, self._number, self._scrubber.threads_left)
        finally:
            self._scrubber.after()
