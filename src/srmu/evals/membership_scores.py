"""Scores that tell texts a model was trained on from others: loss, zlib, Min-K and Min-K++."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from srmu.engine.generate import join_responses
from srmu.engine.losses import is_predicted
from srmu.engine.train import move_batch
from srmu.evals.statistics import Array
from srmu.evals.subject import Subject

LENGTH = 512  # tokens of a text
SHARE = 0.2  # of the tokens that Min-K looks at
SCORES = ("loss", "zlib", "min-k", "min-k++")
LOGITS = 2**26  # numbers in a batch's logits: 256 MB in float32


@torch.no_grad()
def membership_scores(model: Subject, texts: Sequence[str]) -> Array:
    """The SCORES of each text of two tokens or more, higher for a member: (texts, 4)."""
    rows = [model.tokens(text)[: min(LENGTH, model.max_length)] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    size = model.module.get_input_embeddings().weight.shape[0]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scores = np.empty((len(rows), len(SCORES)))
    while order:
        count = max(1, LOGITS // (size * len(rows[order[0]])))
        part, order = order[:count], order[count:]
        batch = move_batch(join_responses([[]] * len(part), [rows[i] for i in part]), model.device)
        mask = is_predicted(batch["labels"])
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model.module(**read, use_cache=False).logits
        for i, ids, kept, row_logits in zip(part, batch["input_ids"], mask, logits, strict=True):
            logs = row_logits[:-1][kept].float().log_softmax(-1)  # (T, V)
            logp, p = logs.gather(-1, ids[1:][kept][:, None])[:, 0], logs.exp()
            # arXiv 2404.02936, Min-K++: (log p - mu) / sigma, of log p under p itself
            mu = (p * logs).sum(-1)
            sigma = (p * (logs - mu[:, None]) ** 2).sum(-1).sqrt()
            standard = (logp - mu) / sigma.clamp(min=1e-6)
            words = model.tokenizer.decode(rows[i], skip_special_tokens=True)
            # arXiv 2012.07805: log-likelihood by the size of the compressed text
            mean = float(logp.mean())
            packed = mean / len(zlib.compress(words.encode()))
            scores[i] = mean, packed, mean_lowest(logp), mean_lowest(standard)
    return scores


def mean_lowest(values: Tensor, share: float = SHARE) -> float:
    """Mean of the lowest `share` of the values, at least of one (Min-K, arXiv 2310.16789)."""
    count = max(1, int(share * len(values)))
    return float(values.sort().values[:count].mean())
