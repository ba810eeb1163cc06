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
    """Keep trained networks and scorecard in the bundle's private part, for serving."""
    assert plan.spec.bundle is not None
    try:
        with exclusive_access(Storage(plan.spec.bundle)):  # what is read is what the new one takes the place of
            _merge_into_bundle(plan, card)
    except StorageError as error:
        if not quiet:
            ProgressDisplay().warn(f"the bundle keeps no scorecard: {error}")


def _merge_into_bundle(plan: AttackPlan, card: dict[str, Any]) -> None:
    from safetensors.torch import load

    assert plan.spec.bundle is not None
    files = {name: plan.storage.read(name) for name in (SCORES, EXAMPLES)}
    card, files, kept = _merge_with_stored(plan.spec.bundle, card, files)
    networks = {}
    for options in plan.suite.attacks:
        if options.name in kept:
            continue
        folder = plan.folder(options.name)
        if folder.exists("network.safetensors"):
            networks[options.name] = (options.model_dump(mode="json"), load(folder.read("network.safetensors")))
    add_attacks(plan.spec.bundle, networks, card, files)


def _merge_with_stored(
    bundle: str, card: dict[str, Any], files: dict[str, bytes]
) -> tuple[dict[str, Any], dict[str, bytes], set[str]]:
    """A scorecard together with what the bundle keeps already: of each attack the run that found more.

    A weaker attack afterwards must not make a bundle look better. Gives the names of attacks whose earlier run is kept.
    """
    from safetensors.torch import load, save

    private = Storage(bundle).folder("private")
    if not private.exists(SCORECARD):
        return card, files, set()
    before = json.loads(private.read(SCORECARD))
    attacks = dict(card["attacks"])
    kept: set[str] = set()
    for name, was in before["attacks"].items():
        now = attacks.get(name)
        if was["status"] == "done" and (now is None or now["status"] != "done" or rank_key(was) > rank_key(now)):
            attacks[name], kept = was, kept | {name}
        elif now is None:
            attacks[name] = was
    base, other = (card, before) if card["num_queries"] >= before["num_queries"] else (before, card)
    # What a card measured on fewer images says of its own attacks stays true; baselines are those of more images.
    merged = other | base | {"attacks": attacks} | headline(attacks, at_chance=card["at_chance"] is not None)
    rows: list[list[str]] = []
    tables = [list(csv.reader(io.StringIO(text.decode()))) for text in (files[SCORES], private.read(SCORES))]
    names = list(dict.fromkeys(name for table in tables for name in table[0]))
    for table, of_before in zip(tables, (False, True), strict=True):
        for row in table[1:]:
            cells = dict(zip(table[0], row, strict=True))
            of_stored = base is before if row[0].startswith("baseline: ") else row[0] in kept
            if of_stored == of_before:
                rows.append([cells.get(name, "") for name in names])
    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    pictures = load(files[EXAMPLES])
    pictures |= {k: v for k, v in load(private.read(EXAMPLES)).items() if k.partition("/")[0] in kept}
    return merged, {SCORES: text.getvalue().encode(), EXAMPLES: save(pictures)}, kept
