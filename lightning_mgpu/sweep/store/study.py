"""Write the trials of a sweep to a study of Optuna's, for its dashboard and its plots."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_mgpu.errors import ConfigError, one_line
from lightning_mgpu.sweep.space.space import Choice, Dimension, Space, encode
from lightning_mgpu.sweep.store.records import Records, TrialRecord
from lightning_mgpu.sweep.store.results import job_command, relative

log = logging.getLogger(__name__)

_ENDED = ("done", "stopped", "failed")
_NUMBER = "trial"


class OptunaStudy:
    """Study with each trial that has ended, whatever search algorithm has drawn its values.

    Args:
        url: Of the storage, such as ``sqlite:///sweep.db``.
        space: What is searched.
        records: The trials.
        directory: The sweep's, which names the study.
        resumes: Whether the study may be there already.

    Raises:
        ConfigError: The storage cannot be used, or has a study of that name.
    """

    def __init__(
        self, url: str, space: Space, records: Records, directory: Path, resumes: bool
    ) -> None:
        import optuna  # seconds, and optional
        from optuna.study import StudyDirection

        self._records, self._has_failed = records, False
        name, where = relative(directory), f"hydra.sweeper.optuna_storage={url}"
        sides = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}
        directions = [sides[objective.mode] for objective in records.objectives]
        self._distributions = {n: _distribution(d) for n, d in space.dimensions.items()}
        try:
            with _quiet():
                self._study = optuna.create_study(
                    storage=url, study_name=name, directions=directions, load_if_exists=resumes
                )
                self._study.set_metric_names([one.name for one in records.objectives])
                trials = self._study.get_trials(deepcopy=False)
            self._there = {trial.user_attrs.get(_NUMBER) for trial in trials}
        except optuna.exceptions.DuplicatedStudyError as error:
            raise ConfigError(
                f"{where}: has a study named {name} already, of another sweep in that directory."
                f" Delete it (optuna delete-study --study-name {name} --storage {url}), or choose"
                " another storage or hydra.sweep.dir."
            ) from error
        except Exception as error:  # of the database, and its driver
            raise ConfigError(f"{where}: cannot be used, {one_line(error, 300)}") from error

    def add(self, record: TrialRecord | None) -> None:
        """Add a trial that has ended, once; a storage that fails costs the study, not the sweep."""
        if record is None or record.status not in _ENDED or record.number in self._there:
            return
        try:
            with _quiet():
                self._study.add_trial(self._frozen(record))
            self._there.add(record.number)
        except Exception as error:
            if not self._has_failed:
                log.warning(
                    "hydra.sweeper.optuna_storage: a trial is left out, %s", one_line(error)
                )
            self._has_failed = True

    def add_all(self) -> None:
        """Add those that are not there, as of a run of the sweep that was killed."""
        for record in self._records.ordered():
            self.add(record)

    def _frozen(self, record: TrialRecord) -> Any:
        from optuna.trial import TrialState, create_trial

        setting, values = self._records.setting(record), self._records.values(record)
        params = {n: _plain(v) for n, v in setting.values.items() if n in self._distributions}
        has_value = record.status != "failed" and values is not None
        several = bool(self._records.others)
        return create_trial(
            state=TrialState.COMPLETE if has_value else TrialState.FAIL,
            values=list(values.values()) if has_value and values is not None else None,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            user_attrs={
                _NUMBER: record.number,
                "status": record.status,
                "ended_by": record.ended_by,
                "reason": record.reason,
                "directory": record.directory,
                "checkpoint": setting.checkpoint,
                "command": job_command(setting.overrides),
            },
            intermediate_values={} if several else dict(enumerate(record.history)),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's lines on each step, and on what it calls experimental."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(tuple(dict.fromkeys(map(_plain, dimension.values))))
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _plain(value: Any) -> Any:
    """A value that Optuna can store."""
    value = value.item() if hasattr(value, "item") else value
    return value if value is None or isinstance(value, (bool, int, float, str)) else encode(value)
