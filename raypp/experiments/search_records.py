"""Records of finished trials."""

from __future__ import annotations

import json
from typing import Any

from raypp.experiments.search_settings import RESULT, TRIALS, SearchPlan
from raypp.utils.errors import StorageError
from raypp.utils.storage import Storage

WORST_LEAKAGE = 1.0  # reported to the sampler for a trial that was stopped before its attack

TrialRecord = dict[str, Any]


def read_record(folder: Storage) -> TrialRecord:
    """Read a trial's record; raises StorageError if it is damaged or of an earlier version."""
    try:
        record: TrialRecord = json.loads(folder.read(RESULT))
    except ValueError as error:
        raise StorageError(f"{folder.uri}/{RESULT} is damaged: {error}") from error
    if record["status"] == "done" and "leakage_baseline" not in record:
        raise StorageError(f"{folder.uri}/{RESULT} is of an earlier version; take another --name")
    return record


def trial_records(plan: SearchPlan) -> list[TrialRecord]:
    """Stored records of a search's trials, in the order of their names."""
    trials = plan.storage.folder(TRIALS)
    folders = [trials.folder(name) for name in trials.folders()]
    return [read_record(folder) for folder in folders if folder.exists(RESULT)]
