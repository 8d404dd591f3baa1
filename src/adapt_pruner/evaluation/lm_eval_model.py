"""Run one of lm-eval's tasks on a model."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models import huggingface

from ..data.calibration import check_vocabulary
from ..errors import EvaluationError, NonFiniteError
from ..settings import EvaluationSettings
from . import task_data
from .harness import SEEDS, limit_of
from .lm_eval_calls import explained, hushed

_HFLM: Any = huggingface.HFLM


class Harnessed(_HFLM):
    """lm-eval's Hugging Face model, without its own progress bars, and with a watchful eye."""

    on_progress: Callable[[int, int | None], None] = staticmethod(lambda done, total: None)

    def __init__(self, model: Any, tokenizer: Any, settings: EvaluationSettings):
        on_cpu = model.device.type == "cpu"
        automatic = settings.batch_size == "auto"
        with hushed():
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a padding token
                # On the CPU lm-eval's "auto" would try 64 full-length windows at once.
                batch_size=1 if automatic and on_cpu else settings.batch_size,
                max_length=settings.max_length,
            )
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        if self.prefix_token_id is None:
            raise EvaluationError(
                "The tokenizer has neither a token that begins nor one that ends a text; lm-eval "
                "needs one. Is it the tokenizer of this model?"
            )

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        ids = super().tok_encode(string, *args, **kwargs)
        check_vocabulary(max(ids, default=0), self.vocabulary)
        return ids

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any):
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        check_vocabulary(int(ids.max()), self.vocabulary)
        return ids, mask

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._count(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._count(None)  # windows, whose number shows when the texts are tokenised
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._count(len(requests))
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["disable_tqdm"] = True
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise EvaluationError(
                f"An answer of this task has {longest} tokens, and the model reads at most "
                f"{self.max_length}; lm-eval cannot score it. Measure other tasks, or fewer items."
            )
        found = super()._loglikelihood_tokens(requests, *args, **kwargs)
        if any(math.isnan(value) for value, _ in found):
            raise NonFiniteError("The model puts out NaN. Try --dtype float32.")
        return found

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._advance(len(inps))
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._advance(len(context))
        return super()._model_generate(context, *args, **kwargs)

    def _count(self, total: int | None) -> None:
        self._done, self._total = 0, total

    def _advance(self, number: int) -> None:
        self._done += number
        self.on_progress(self._done, self._total)


def run_task(lm: Harnessed, task: Any, settings: EvaluationSettings) -> dict[str, Any]:
    """Run one task and return its metrics as lm-eval reports them.

    Raises:
        EvaluationError, NonFiniteError: if lm-eval cannot run it, or the model breaks.
    """
    seeds = SEEDS if settings.seed is None else [settings.seed] * 4
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.manual_seed(seeds[2])
    name = task.task_name
    chosen: Any = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    limit: Any = settings.limit
    with explained(name, "Task"), hushed():
        if "data_files" in (task.get_config("dataset_kwargs") or {}):
            task_data.check_labels(task, limit_of(task, settings))
        try:
            results: Any = evaluate(lm=lm, task_dict=chosen, limit=limit, log_samples=False)
        except OverflowError:
            raise NonFiniteError(
                f"The perplexity of task '{name}' is beyond what a float can hold: the model is "
                "broken, or the tokenizer is another model's."
            ) from None
    metrics = {k: v for k, v in results["results"][name].items() if k not in ("alias", "name")}
    if any(isinstance(value, float) and not math.isfinite(value) for value in metrics.values()):
        raise NonFiniteError(f"Task '{name}' measured {metrics}. Try --dtype float32.")
    return {
        "metrics": metrics,
        "higher_is_better": results["higher_is_better"].get(name, {}),
        "num_samples": results["n-samples"][name]["effective"],
        "max_length": lm.max_length,
        "batch_sizes": sorted(set(lm.batch_sizes.values())) or [lm.batch_size],
    }
