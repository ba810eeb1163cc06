"""Store the scorecard and attack networks of a run in its bundle."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from raypp.bundle.export import add_attacks
from raypp.evaluation.scorecard import rank_key
from raypp.experiments.attack_plan import EXAMPLES, SCORECARD, SCORES, AttackPlan
from raypp.experiments.attack_scores import headline
from raypp.experiments.run_folder import exclusive_access
from raypp.utils.errors import StorageError
from raypp.utils.progress import ProgressDisplay
from raypp.utils.storage import Storage


def export_to_bundle(plan: AttackPlan, card: dict[str, Any], quiet: bool) -> None:
    """Store trained networks and the scorecard in the bundle's private part, for serving."""
    assert plan.spec.bundle is not None
    try:
        with exclusive_access(Storage(plan.spec.bundle)):  # no other process may write between our read and write
            _merge_into_bundle(plan, card)
    except StorageError as error:
        if not quiet:
            ProgressDisplay().warn(f"the scorecard could not be stored in the bundle: {error}")


def _merge_into_bundle(plan: AttackPlan, card: dict[str, Any]) -> None:
    from safetensors.torch import load

    assert plan.spec.bundle is not None
    files = {name: plan.storage.read(name) for name in (SCORES, EXAMPLES)}
    card, files, from_stored = _merge_with_stored(plan.spec.bundle, card, files)
    networks = {}
    for options in plan.suite.attacks:
        folder = plan.folder(options.name)
        if options.name not in from_stored and folder.exists("network.safetensors"):
            networks[options.name] = (options.model_dump(mode="json"), load(folder.read("network.safetensors")))
    add_attacks(plan.spec.bundle, networks, card, files)


def _merge_with_stored(
    bundle: str, card: dict[str, Any], files: dict[str, bytes]
) -> tuple[dict[str, Any], dict[str, bytes], set[str]]:
    """Merge a scorecard with the one stored in the bundle; each attack keeps its stronger run.

    A weaker later attack must not make a bundle look better.

    Returns:
        The scorecard, its files, and the names of attacks whose stored run is the stronger one.
    """
    from safetensors.torch import load, save

    private = Storage(bundle).folder("private")
    if not private.exists(SCORECARD):
        return card, files, set()
    stored = json.loads(private.read(SCORECARD))
    if "strongest_attack" not in stored:  # of an earlier version, whose results have other names
        return card, files, set()
    attacks, from_stored = _merge_attacks(card["attacks"], stored["attacks"])
    # The smaller card's results of its own attacks stay valid; the baselines are those of the card with more queries.
    stored_is_larger = card["num_queries"] < stored["num_queries"]
    base, other = (stored, card) if stored_is_larger else (card, stored)
    merged = other | base | {"attacks": attacks} | headline(attacks, at_chance=card["at_chance"] is not None)
    scores = _merge_scores(files[SCORES], private.read(SCORES), from_stored, stored_is_larger)
    examples = load(files[EXAMPLES])
    examples |= {k: v for k, v in load(private.read(EXAMPLES)).items() if k.partition("/")[0] in from_stored}
    return merged, {SCORES: scores, EXAMPLES: save(examples)}, from_stored


def _merge_attacks(new: dict[str, Any], stored: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Results by attack, and the names of attacks whose stored run is the stronger one."""
    attacks = dict(new)
    from_stored: set[str] = set()
    for name, old in stored.items():
        now = new.get(name)
        if old["status"] == "done" and (now is None or now["status"] != "done" or rank_key(old) > rank_key(now)):
            attacks[name] = old
            from_stored.add(name)
        elif now is None:
            attacks[name] = old
    return attacks, from_stored


def _merge_scores(new: bytes, stored: bytes, from_stored: set[str], stored_baselines: bool) -> bytes:
    """Merge two ``scores.csv``: each row comes from the run whose result is kept."""
    tables = [list(csv.reader(io.StringIO(data.decode()))) for data in (new, stored)]
    columns = list(dict.fromkeys(column for table in tables for column in table[0]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    for (header, *rows), is_stored in zip(tables, (False, True), strict=True):
        for row in rows:
            use_stored = stored_baselines if row[0].startswith("baseline: ") else row[0] in from_stored
            if use_stored == is_stored:
                writer.writerow(dict(zip(header, row, strict=True)))
    return text.getvalue().encode()
