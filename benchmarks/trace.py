"""Where a testbed's model looks up what it tells of a name: a causal trace, layer by layer.

    python benchmarks/trace.py TESTBED NAMES

Texts are read in two namings of names of equal length. The output of one layer's MLP in the first
is replaced by that of the second, and what the second would say becomes likelier: by how many nats,
is the layer's effect. Prints it for the MLP of each layer.
"""

import sys
from pathlib import Path

import torch

from srmu.engine.model import EditableModel, find_child
from srmu.methods.rename_scrub import RenameScrub
from srmu.methods.renaming import NamingGroup, OwnTexts, leave_one_out
from srmu.runs.config import load_config
from srmu.runs.plan import load_tokenizer, load_topics


def halves(group: NamingGroup, naming: int) -> NamingGroup:
    """The texts of a group in one of its namings."""
    rows = torch.arange(len(group.places)) * group.places.shape[1] + naming
    batch = {name: tensor[rows] for name, tensor in group.batch.items()}
    parts = (x[:, naming : naming + 1] for x in (group.places, group.follows, group.alike))
    return NamingGroup(batch, *parts)


@torch.no_grad()
def effects(model: EditableModel, own: OwnTexts, texts: int = 48) -> list[float]:
    """Mean rise in nats of the other naming's answer, by the layer whose MLP is replaced."""
    rises: list[list[float]] = [[] for _ in model.layers]
    for text in own.texts[:texts]:
        group = own.group([text], 2, "trace")
        first, second = halves(group, 0), halves(group, 1)
        if not first.places.equal(second.places):
            continue  # names of other lengths: positions do not match
        before = group.read(model)
        where = (group.follows & group.alike & (leave_one_out(before)[1] > 0.3)).any(1)[0]
        answers = before[0, 1].argmax(-1)[where]
        plain = before[0, 0][where].gather(-1, answers[:, None])
        for number, layer in enumerate(model.layers):
            mlp = find_child(layer, "mlp")
            kept: list[torch.Tensor] = []
            handle = mlp.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
            second.read(model)
            handle.remove()
            handle = mlp.register_forward_hook(lambda m, a, out, kept=kept: kept[0])
            changed = first.read(model)[0, 0][where].gather(-1, answers[:, None])
            handle.remove()
            rises[number] += (changed - plain).flatten().tolist()
    return [sum(rise) / max(1, len(rise)) for rise in rises]


def main(testbed: Path, names: str) -> None:
    torch.set_num_threads(1)
    settings = ["method.name=rename_scrub", f"method.names={names}", "method.own_texts=200"]
    config = load_config(testbed / "high.yaml", settings)
    (topic,) = load_topics(config, load_tokenizer(testbed / "model"))
    method = config.method
    assert isinstance(method, RenameScrub)
    model = EditableModel.load(testbed / "model", depth=None, trainable=("*",))
    own = method.setup(model, topic).memory["own"]
    for layer, rise in enumerate(effects(model, own)):
        print(f"layer {layer}: {rise:6.2f} nats")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
