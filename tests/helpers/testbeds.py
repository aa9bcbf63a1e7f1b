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


# an lm-eval task over `quiz.jsonl`, rows of question, options and answer
QUIZ = """task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
