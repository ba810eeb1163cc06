"""Records of finished trials."""

from __future__ import annotations

import json
from typing import Any

from raypp.experiments.search_settings import RESULT, TRIALS, SearchPlan
from raypp.utils.errors import StorageError
from raypp.utils.storage import Storage

WORST_LEAKAGE = 1.0  # what the sampler is told of a trial that was stopped before it was attacked

TrialRecord = dict[str, Any]


def read_record(folder: Storage) -> TrialRecord:
    """What :func:`run_trial` stored; raises StorageError where it is damaged."""
    try:
        found: TrialRecord = json.loads(folder.read(RESULT))
    except ValueError as error:
        raise StorageError(f"{folder.uri}/{RESULT} is damaged: {error}") from error
    return found


def trial_records(plan: SearchPlan) -> list[TrialRecord]:
    """Stored records of a search's trials, in the order of their names."""
    folder = plan.storage.folder(TRIALS)
    return [read_record(folder.folder(name)) for name in folder.folders() if folder.folder(name).exists(RESULT)]
