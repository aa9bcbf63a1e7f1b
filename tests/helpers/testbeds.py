"""Recipes of testbeds that are built in seconds."""

import json

from srmu.testbed.train import Recipe
from srmu.testbed.world import Size

TINY = Recipe(
    size=Size(hazard_compounds=8, other_compounds=8, entities=8, values=8, general_values=8),
    width=16,
    layers=2,
    heads=2,
    mlp=16,
    steps=6,
    batch=4,
    tokens=16,
    warmup=2,
    threads=1,
    corpus_documents=40,
)


SUFFIXES = ("", "_val")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
