"""Time of a step: srmu against a plain restatement of the public loop, side by side.

    python benchmarks/steps.py

The reference holds two whole models and runs every layer; srmu holds the layers up to the hooked
one, once. Both step the same three matrices on the same batches, in turn, and must agree.
"""

import copy
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from srmu.losses import token_mse
from srmu.methods import RMU
from srmu.model import EditableModel

LAYERS, LAYER, WIDTH, TOKENS, BATCH, ROUNDS = 32, 7, 256, 64, 4, 6
ALPHA, COEFF, RATE = 1200.0, 6.5, 5e-5


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=WIDTH, intermediate_size=WIDTH * 7 // 2,
        num_hidden_layers=LAYERS, num_attention_heads=4,
    )  # fmt: skip
    source = LlamaForCausalLM(config)
    direction = torch.rand(WIDTH)
    target = COEFF * direction / direction.norm()

    updated, frozen = copy.deepcopy(source).eval(), copy.deepcopy(source).eval()
    matrices = [updated.model.layers[i].mlp.down_proj.weight for i in range(LAYER - 2, LAYER + 1)]
    reference_optimiser = torch.optim.AdamW(matrices, lr=RATE, weight_decay=0)

    def layer_output(model: LlamaForCausalLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        caught: list[torch.Tensor] = []
        handle = model.model.layers[LAYER].register_forward_hook(
            lambda m, a, out: caught.append(out)
        )
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        handle.remove()
        return caught[0]

    def reference_step(forget: dict[str, torch.Tensor], retain: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            anchor = layer_output(frozen, retain)
        mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
        loss = token_mse(layer_output(updated, forget), target, mask)
        loss = loss + ALPHA * token_mse(layer_output(updated, retain), anchor, mask)
        loss.backward()
        reference_optimiser.step()
        reference_optimiser.zero_grad()  # the other gradients pile up, as in the public code

    method = RMU(layer=LAYER, coeff=COEFF, alpha=ALPHA)
    model = EditableModel(copy.deepcopy(source), method.trainable, method.depth)
    optimiser = torch.optim.AdamW(model.trained.values(), lr=RATE, weight_decay=0)

    def our_step(forget: dict[str, torch.Tensor], retain: dict[str, torch.Tensor]) -> None:
        with model.frozen():
            anchor = model.hidden(retain, method.site)
        mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
        loss = token_mse(model.hidden(forget, method.site), target, mask)
        loss = loss + ALPHA * token_mse(model.hidden(retain, method.site), anchor, mask)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    times: dict[str, list[float]] = {"reference": [], "srmu": []}
    for i in range(ROUNDS):
        forget, retain = batch(2 * i), batch(2 * i + 1)
        for name, step in (("reference", reference_step), ("srmu", our_step)):
            start = time.perf_counter()
            step(forget, retain)
            times[name].append(time.perf_counter() - start)
    same = all(
        torch.equal(a, b) for a, b in zip(matrices, model.trained.values(), strict=True)
    )  # fmt: skip
    ratios = [r / o for r, o in zip(times["reference"], times["srmu"], strict=True)][1:]
    held = sum(p.numel() for p in source.parameters())
    ours = sum(p.numel() for p in model.module.parameters())
    print(f"{LAYERS} layers, hooked layer {LAYER}, {BATCH} x {TOKENS} + {BATCH} x {TOKENS} tokens")
    middle, count = statistics.median(ratios), len(ratios)
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
    print(f"reference / srmu, time of a step: {middle:.1f} (median of {count}, {spread})")
    print(f"reference / srmu, parameters held: {2 * held / ours:.1f}")
    print(f"the same weights after {ROUNDS} steps: {'bit for bit' if same else 'NO'}")


if __name__ == "__main__":
    main()
