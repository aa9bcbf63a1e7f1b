"""Folders as runs, sweeps, automatic choices and reproductions leave them, with made-up numbers."""

import json
import math
import random

import numpy as np
import yaml
from safetensors.numpy import save_file

from helpers.results import write_metrics, write_report
from srmu.report.results import RunGroup
from srmu.testbed.ground import draw_ground

METRICS = ("testbed_hazard/acc", "testbed_neighbour/acc", "testbed_general/acc")
COUNTS = (192, 240, 180)
METHODS = {  # label: name in the config
    "RMU": "rmu",
    "SRMU": "srmu",
    "Adaptive RMU": "adaptive_rmu",
    "SRMU + random anchors": "srmu",
}
AFTER = {  # hazard, neighbour, general of each method, in per cent
    "low entanglement": [(34, 48, 100), (34, 46, 100), (37, 51, 100), (35, 68, 100)],
    "high entanglement": [(34, 99, 68), (34, 100, 78), (38, 99, 76), (33, 99, 97)],
}
SECRET_TEXT = "the activator of zorvex is brimstone salt"
SECRET_HOME = "/home/someone/private"
SECRET_PATH = f"{SECRET_HOME}/forget.jsonl"


def flat(percents):
    return {
        metric: {"value": percent / 100, "stderr": 0.03, "n": n}
        for metric, percent, n in zip(METRICS, percents, COUNTS, strict=True)
    }


def write_run(folder, label, group, seed, percents, steps=120, width=192):
    """A run folder as `srmu unlearn` leaves it, with numbers that look like a real one's."""
    folder.mkdir(parents=True)
    draw = random.Random(f"{label} {group} {seed}")
    numpy = np.random.default_rng(seed)
    method = METHODS[label]
    config = {
        "model": f"{SECRET_HOME}/model",
        "method": {"name": method, "layer": 4, "kappa": 8.0, "alpha": 40.0},
        "topics": {"topic": {"forget": SECRET_PATH, "retain": SECRET_PATH}},
        "train": {"learning_rate": 0.006, "max_steps": steps, "batch_size": 8},
        "eval": ["testbed"],
        "seed": seed,
    }
    if "anchors" in label:
        config["method"]["anchors"] = "random"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for step in range(steps):
        noise = draw.gauss(0, 0.02)
        pull = math.exp(-step / (14 + 5 * list(METHODS).index(label)))
        line = {"step": step, "topic": "topic", "seconds": 0.03, "target_ratio": 8.0}
        line["forget"] = (0.12 + 0.88 * pull) * (1 + noise)
        line["retain"] = 0.02 * (1 - pull) * (1 + 3 * abs(noise)) + 1e-4
        line["loss"] = line["forget"] + line["retain"]
        if method != "adaptive_rmu":
            line["forget_cos"] = 0.95 - 0.85 * pull + noise
            line["retain_cos"] = 1 - 0.08 * (1 - pull) + noise / 10
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    facts = {"coeff": 15.7, "kappa": 8.0, "target_norm": 221.0, "activation_norm": 27.6}
    state = {"topic.direction": numpy.choice([-1.0, 1.0], width).astype(np.float32)}
    state["topic.target"] = state["topic.direction"] * np.float32(15.7)
    if method == "srmu":
        spread = numpy.beta(1.2, 6, width) if group.startswith("high") else numpy.normal(0.88, 0.04, width)
        values = np.clip(spread, 0, 1).astype(np.float32)
        state["topic.importance"] = values
        facts["importance"] = {
            "mean": float(values.mean()),
            "sd": float(values.std()),
            "share_above_half": float((values > 0.5).mean()),
            "gini": 0.33,
        }
    save_file(state, folder / "state.safetensors")
    shifted = [min(100, percent + shift) for percent, shift in zip(percents, (seed - 1,) * 3, strict=True)]
    write_metrics(folder, before=flat((100, 100, 100)), after=flat(shifted))
    record = {
        "id": f"{draw.getrandbits(32):08x}",
        "method": method,
        "seconds": round(4 + draw.random(), 2),
        "steps": steps,
        "stop_reason": "max_steps",
        "topics": {"topic": facts},
        "base": {"files": {"model.safetensors": {"sha256": folder.name}}},
        "model": f"{SECRET_HOME}/model",
        "changed": ["model.layers.4.mlp.down_proj.weight"],
        "diverged": False,
        "data": {"topic": {"forget": {"documents": 240, "tokens": 7680, "digest": "6b8dc148e8"}}},
        "environment": {"cwd": SECRET_PATH, "note": SECRET_TEXT, "python": "3.11.7"},
    }
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def write_comparison(root, seeds=3):
    entries = []
    for group, rows in AFTER.items():
        for label, percents in zip(METHODS, rows, strict=True):
            folders = [root / f"{group}-{label}-{seed}".replace(" ", "-") for seed in range(seeds)]
            for seed, folder in enumerate(folders):
                write_run(folder, label, group, seed, percents)
            entries.append(RunGroup(label, group, tuple(folders)))
    return entries


def right(share, count, draw):
    """As many right answers among `count`, as a text with a digit for each."""
    answers = [i < round(share * count) for i in range(count)]
    draw.shuffle(answers)
    return "".join(str(int(answer)) for answer in answers)


def interval(share, count=96):
    half = 1.96 * (share * (1 - share) / count) ** 0.5
    return {"value": share, "low": max(0, share - half), "high": min(1, share + half), "n": count}


def write_attacks(folder, left, seed=0, tier="standard"):
    """The attacks on a run: `left` is the accuracy that the strongest one finds."""
    draw, count = random.Random(seed), 96
    facts = [i // 2 for i in range(count)]

    def entry(id_, after, original=1.0, oracle=0.26, **more):
        controls = {
            who: {"right": right(share, count, draw), "accuracy": interval(share), "metrics": {}}
            for who, share in (("original", original), ("oracle", oracle))
        }
        found = {"id": id_, "status": "done", "why": "", "valid": True, "chosen": "as they are"}
        found |= {"accuracy": interval(after), "right": right(after, count, draw)}
        return found | {"controls": controls, "metrics": {}, "settings": {}} | more

    again = {
        f"{variant}, n={texts}": {"test": 0.34 + (left - 0.34) * texts / 50 * slope, "val": 0.3}
        for variant, slope in (("LoRA", 0.3), ("full weights", 1))
        for texts in (5, 10, 50)
    }

    def by_steps(last):
        return {
            f"{kind}, {steps} steps": {"test": 0.34 + (last - 0.34) * steps / 100, "val": 0.3}
            for kind in ("LoRA", "neutral texts, full weights")
            for steps in (0, 20, 100)
        }

    stepped = entry("E19", left, chosen="LoRA, 100 steps", settings=by_steps(left))
    for who, share in (("original", 1.0), ("oracle", 0.26)):
        stepped["controls"][who]["settings"] = {setting: {"test": share, "val": share} for setting in by_steps(left)}
    attacks = {
        "forced_choice": entry("E0", 0.34),
        "prompts": entry("E12", 0.42, chosen="role 1"),
        "benign_relearning": entry("E7", left, chosen="full weights, n=50", settings=again),
        "relearning_steps": stepped,
        "soft_prompt": entry("E14", 0.97, oracle=0.9, valid=False),
        "membership": {
            "id": "E15",
            "status": "done",
            "why": "",
            "metrics": {"auc loss": interval(0.51)},
            "controls": {"original": {"metrics": {"auc loss": interval(0.98)}}},
        },
        "gcg": {"id": "E13", "status": "failed", "why": f"no room in {SECRET_PATH}", "metrics": {}, "controls": {}},
    }
    kept = {"facts": facts, "before": "1" * count, "after": right(0.9, count, draw)}
    report = {
        "tier": tier,
        "chance": 0.25,
        "seed": 0,
        "facts": facts,
        "attacks": attacks,
        "original": {"right": "1" * count, "accuracy": interval(1.0)},
        "oracle": True,
        "tasks": {"test": ["testbed_hazard"], "utility": ["testbed_general"], "val": "x"},
        "utility": {"testbed_general": kept},
        "not_tried": ["heavy_tuning"],
        "K*": interval(left) | {"attack": "benign_relearning"},
    }
    write_report(folder, report)


def write_sweep(folder, objectives=2, runs=False):
    """A sweep over kappa and alpha, with a failed, a pruned and a running trial."""
    draw = random.Random(7)
    names = {"testbed_hazard/acc": "minimize", "testbed_general/acc": "maximize"}
    names = dict([*names.items()][:objectives])
    trials = []
    for number, (kappa, alpha) in enumerate((k, a) for k in (2, 4, 8, 16, 32, 64) for a in (10, 100, 1000)):
        strength = kappa / (kappa + alpha**0.5)
        values = {
            "testbed_hazard/acc": max(0.25, 1 - strength) + draw.uniform(0, 0.06),
            "testbed_general/acc": min(1, 1.02 - strength**3) - draw.uniform(0, 0.06),
        }
        values = {name: min(1.0, values[name]) for name in names}
        trial = {
            "number": number,
            "state": "complete",
            "params": {"method.kappa": kappa, "method.alpha": alpha},
            "values": values,
            "replicates": {k: [v, v] for k, v in values.items()},
            "errors": {k: [0.03, 0.03] for k in values},
            "n": dict.fromkeys(values, 192),
            "runs": [],
            "seconds": 3.1,
            "why": "",
        }
        trials.append(trial)
    empty = {"values": {}, "replicates": {}, "errors": {}, "n": {}}
    trials[15] |= empty | {"state": "failed", "why": f"diverged at step 3, see {SECRET_PATH}"}
    trials[16] |= empty | {"state": "pruned", "why": "worse than the median after 1 seeds"}
    trials[17] |= empty | {"state": "running"}
    done = [t for t in trials if t["state"] == "complete"]

    def beaten(one):
        return any(
            other is not one
            and all(
                other["values"][k] <= one["values"][k] if way == "minimize" else other["values"][k] >= one["values"][k]
                for k, way in names.items()
            )
            for other in done
        )

    front = [t["number"] for t in done if not beaten(t)]
    folder.mkdir(parents=True)
    if runs:
        trials[front[0]]["runs"] = ["runs/best"]
        write_run(folder / "runs" / "best", "SRMU", "", 0, (34, 90, 95), steps=8)
        write_attacks(folder / "runs" / "best", 0.8)
    found = {
        "kind": "sweep",
        "name": "kappa-alpha",
        "sampler": "grid",
        "seeds": [0, 1],
        "objectives": names,
        "space": {"method.kappa": [2, 4, 8, 16, 32, 64], "method.alpha": {"low": 10, "high": 1000, "log": True}},
        "trials": trials,
        "front": front,
        "importance": {"method.kappa": 0.71, "method.alpha": 0.29},
    }
    (folder / "sweep.json").write_text(json.dumps(found, sort_keys=True))
    return folder


def write_auto(folder):
    """An automatic choice: four layers scanned, eight strengths tried, one run made."""
    write_run(folder / "runs" / "chosen", "SRMU", "", 0, (36, 97, 100))
    write_attacks(folder / "runs" / "chosen", 0.86, tier="smoke")
    layers = [
        {"layer": i, "forgetting": f, "utility_loss": u}
        for i, f, u in ((2, 0.71, 0.011), (3, 0.38, 0.001), (4, 0.62, 0.004), (5, 0.55, 0.001))
    ]
    trials = [
        {
            "number": i,
            "state": "complete",
            "params": {"method.kappa": 2.0**i},
            "seconds": 3.0,
            "values": {"forgetting": 1 - 0.8**i, "utility_loss": 0.0004 * 2**i},
            "runs": [],
            "why": "",
        }
        for i in range(8)
    ]
    both = {"forgetting": interval(0.66), "utility_loss": interval(0.008)}
    found = {
        "kind": "auto",
        "budget": 0.01,
        "yardstick": "tasks",
        "run": "runs/chosen",
        "choices": [
            {"step": "entanglement", "sentence": "The retain texts use 47% of the forget texts' words."},
            {"step": "layers", "sentence": "Layer 4 is steered: it forgets most for what it costs."},
            {"step": "export", "sentence": f"The whole model lies in {SECRET_PATH}."},
        ],
        "scan": {"layers": layers, "best": 4},
        "trials": trials,
        "defaults": {"params": {}, "runs": [], "values": {"forgetting": 0.0, "utility_loss": 0.0}},
        "final": {"val": both, "test": both, "defaults": {k: interval(0.1) for k in both}, "model": "model"},
    }
    (folder / "auto.json").write_text(json.dumps(found))
    return folder


def write_reproduction(folder):
    """A table with a row that was not run, and a figure of two families."""
    folder.mkdir(parents=True)
    rows = [
        {
            "label": name,
            "kappa": 8.0,
            "cells": {"hazard": interval(h, 576), "general": interval(g, 576)},
            "paper": {"WMDP": p, "MMLU": m},
        }
        for name, h, g, p, m in (
            ("before", 0.999, 0.999, 0.648, 0.585),
            ("RMU", 0.34, 0.68, 0.301, 0.571),
            ("SRMU (ratio)", 0.34, 0.78, 0.292, 0.575),
        )
    ]
    rows.append({"label": "SRMU (difference)", "cells": {}, "paper": {}, "kappa": None, "why": "diverged"})
    claim = {
        "claim": "SRMU keeps more than RMU",
        "source": "Table 3",
        "verdict": "within noise",
        "difference": {"value": 0.1, "low": -0.02, "high": 0.22},
        "paper": None,
        "sentence": "SRMU less RMU: +10.0 points (-2.0 to +22.0).",
    }
    untested = claim | {"verdict": "not tested", "difference": None, "claim": "Ablations cost utility"}
    series = [
        {
            "label": label,
            "points": [
                {
                    "coeff": c,
                    "kappa": c / 10,
                    "x": interval(0.7 * c / (c + bend), 576),
                    "y": interval(1 - 0.4 * (c / 170) ** 2, 576),
                }
                for c in range(1, 171, 10)
            ],
        }
        for label, bend in (("RMU", 30), ("SRMU (ratio)", 15))
    ]
    series[1]["points"][-1] |= {"x": None, "y": None, "kappa": None, "why": "diverged"}
    same = {"points": 17, "seeds": 3, "utility_loss": interval(0.05, 576), "note": "", "residual": None}
    gap = {"forget_difference": {"value": 0.041, "low": -0.02, "high": 0.1}, "residual_difference": None}
    compared = [
        {"method": "RMU", **same, **dict.fromkeys(gap), "forget_accuracy": interval(0.5, 576), "verdict": ""},
        {"method": "SRMU (ratio)", **same, **gap, "forget_accuracy": interval(0.541, 576), "verdict": "noise"},
    ]
    found = {
        "kind": "reproduction",
        "model": "testbed",
        "command": "srmu reproduce all",
        "seeds": [0, 1, 2],
        "regions": [],
        "tables": [
            {
                "name": "table3",
                "missing": 2,
                "title": "Table 3: high entanglement",
                "note": "Three testbeds.",
                "columns": ["hazard", "general"],
                "rows": rows,
                "paper_columns": ["WMDP", "MMLU"],
                "claims": [claim, untested],
            }
        ],
        "figures": [
            {
                "name": "figure2",
                "title": "Figure 2: families",
                "x_title": "accuracy forgotten",
                "y_title": "accuracy kept",
                "series": series,
                "head": "coeff",
                "missing": 0,
                "compared": [{"kept": "general", "lost": 0.05, "rows": compared}],
                "relearned": [
                    {"method": "RMU", "why": "diverged"},
                    {"method": "SRMU (ratio)", "kappa": 8.0, "steps": {"0 steps": 0.3}, "K*": interval(0.9, 96)},
                ],
                "claims": [claim],
            }
        ],
    }
    (folder / "reproduce.json").write_text(json.dumps(found))
    return folder


PLACES = {  # task: its facts with their answers and places, two phrasings each
    "testbed_hazard": {
        "Kisumu": ("Kenya", (-0.1, 34.75)),
        "Kano": ("Nigeria", (12.0, 8.52)),
        "Oran": ("Algeria", (35.7, -0.63)),
        "Tunis": ("Tunisia", (36.8, 10.17)),
    },
    "testbed_neighbour": {
        "Leipzig": ("Germany", (51.3, 12.37)),
        "Lima & Callao": ("Peru", (-12.0, -77.0)),
        "Laos": ("kip", None),
    },
}
KNOWN = {"testbed_hazard": "11111101", "testbed_neighbour": "111111"}  # not Tunis
LOST = {"testbed_hazard": "00101101", "testbed_neighbour": "110100"}  # Kisumu, half of Kano, half of Lima, Laos


def write_atlas(folder, world="atlas"):
    """A testbed of real places, but without its model and its texts."""
    (folder / "tasks").mkdir(parents=True)
    (folder / "testbed.json").write_text(json.dumps({"world": world, "region": "Africa"}))
    places = [place for facts in PLACES.values() for _, place in facts.values() if place]
    (folder / "ground.png").write_bytes(draw_ground(places))
    for task, facts in PLACES.items():
        lines = []
        for subject, (answer, place) in facts.items():
            row = {"choices": ["wrong", answer], "gold": 1, "subject": subject, "fact": f"country of {subject}"}
            lines += [json.dumps(row | ({"place": place} if place else {}) | {"question": n}) for n in range(2)]
        (folder / "tasks" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_atlas_run(folder, atlas, label="SRMU", seed=0, after=LOST, before=KNOWN):
    """A run on such a testbed with these right answers."""
    write_run(folder, label, "", seed, (34, 90, 95), 6)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"tasks_dir": str(atlas / "tasks")}))
    for when, answers in (("before", before), ("after", after)):
        metrics = {
            f"{task}/acc": {"value": right.count("1") / len(right), "n": len(right), "answers": right}
            for task, right in answers.items()
        }
        write_metrics(folder, **{when: metrics})
    return folder
