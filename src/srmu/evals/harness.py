"""lm-eval's view of a model that is in memory already: read with less work, and left as it is."""

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from copy import deepcopy
from functools import cache, lru_cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import env

from srmu.engine import distributed
from srmu.engine.generate import hides_padding
from srmu.engine.likelihoods import score_answers
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.evals.lm_eval import SEED, silence_output


class Harness(HFLM):
    """A model with its tokenizer as lm-eval takes them; `task` names what it is asked for now."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        with patch.object(model, "tie_weights"):  # HFLM calls it, which would undo an edit of a tied head
            # a copy, because HFLM may give the tokenizer a padding token
            super().__init__(model, tokenizer=deepcopy(tokenizer), batch_size=batch_size, backend="causal")
        if self.prefix_token_id is None:
            raise SrmuError("the tokenizer has neither a bos_token nor an eos_token; lm-eval needs one to begin a text")
        self.encode_once = lru_cache(64)(super().tok_encode)  # a question comes with each option
        self.task = ""
        self.watch: Watch = ignore_progress
        self.screen = sys.stderr

    def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return list(self.encode_once(*args, **kwargs))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[Any]:
        def done(number: int, result: tuple[float, bool]) -> None:
            if requests[number][0] is not None:  # else a part of a rolling request
                self.cache_hook.add_partial("loglikelihood", requests[number][0], result)

        pairs = [(before, answer) for _, before, answer in requests]
        size = {"batch_size": self.batch_size, "dtype": self.softmax_dtype}
        return list(score_answers(self.model, pairs, self.max_length, **size, done=done))

    def loglikelihood(self, requests: list[Any], **options: Any) -> list[Any]:
        return self.answer(requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any], **options: Any) -> list[Any]:
        return self.answer(requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any], **options: Any) -> list[Any]:
        rows = self.batch_size if hides_padding(self.model) else 1
        with patch.object(self, "batch_size_per_gpu", rows):
            return self.answer(requests, super().generate_until)

    def answer(self, requests: list[Any], ask: Any) -> list[Any]:
        """Of several processes each answers some, neighbours together: they share their prompts."""
        each = max(1, -(-len(requests) // distributed.get_size()))
        parts = [requests[low : low + each] for low in range(0, len(requests), each)]
        with redirect_stderr(self.screen), self.watch(self.task, len(requests) // distributed.get_size()) as tick:
            self.set_cache_hook(SimpleNamespace(add_partial=lambda *answered: tick("")))
            work = partial(ask, disable_tqdm=True)
            answers = [one for part in distributed.share_work(parts, work) for one in part]
        scores = [one[0] if isinstance(one, tuple) else one for one in answers]
        if any(score != score for score in scores):
            raise SrmuError(f"task {self.task!r}: the model's output is not a number (NaN)")
        return answers


@contextmanager
def open_harness(model: Any, tokenizer: Any, batch_size: int) -> Iterator[Harness]:
    """lm-eval's view of a model: silent while it lasts, and everything as it was afterwards."""
    with (
        torch.random.fork_rng(range(torch.accelerator.device_count())),
        warnings.catch_warnings(action="ignore"),
        patch.dict(os.environ, DISABLE_MULTIPROC="1"),  # resampling would fork a pool
        patch.object(env, "from_string", cache(env.from_string)),  # else compiled at each question
        ExitStack() as restore,
    ):
        restore.callback(random.setstate, random.getstate())
        restore.callback(np.random.set_state, np.random.get_state())
        restore.callback(logging.disable, logging.root.manager.disable)
        for module in model.modules():
            restore.callback(setattr, module, "training", module.training)
        logging.disable()
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        with silence_output():
            harness = Harness(model, tokenizer, batch_size)
        yield harness
