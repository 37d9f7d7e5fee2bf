"""Metrics as functions of (predictions, references, options), each giving a Score: see docs/metrics.md.

score        what they return, and bootstrap_interval of it
captions     BLEU, ROUGE-L, CIDEr-D; meteor: METEOR, by Java
ptb_tokens   the tokens that these compare, by the rules of ptb_rules
answers      exact match, ANLS, relaxed accuracy, VQA accuracy, words read right
mmmu         MMMU's multiple choice and open questions
"""

from collections.abc import Callable
from functools import partial

from experiments.vlm.evaluate.metrics.answers import (
    anls,
    exact_match,
    relaxed_accuracy,
    vqa_accuracy,
    word_accuracy,
)
from experiments.vlm.evaluate.metrics.captions import bleu, cider, rouge_l
from experiments.vlm.evaluate.metrics.meteor import meteor
from experiments.vlm.evaluate.metrics.mmmu import mmmu_multiple_choice, mmmu_open
from experiments.vlm.evaluate.metrics.ptb_tokens import tokenize
from experiments.vlm.evaluate.metrics.score import Interval, Score, bootstrap_interval

METRICS: dict[str, Callable[..., Score]] = {
    "bleu_1": partial(bleu, n=1),
    "bleu_2": partial(bleu, n=2),
    "bleu_3": partial(bleu, n=3),
    "bleu_4": partial(bleu, n=4),
    "rouge_l": rouge_l,
    "cider": cider,
    "meteor": meteor,
    "vqa_accuracy": vqa_accuracy,
    "exact_match": exact_match,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "word_accuracy": word_accuracy,
    "mmmu_multiple_choice": mmmu_multiple_choice,
    "mmmu_open": mmmu_open,
}

# They take `tokenize`d text.
TOKENIZED = frozenset({"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "meteor"})

__all__ = ["METRICS", "TOKENIZED", "Interval", "Score", "bootstrap_interval", "tokenize"]
