"""The tokeniser of captions gives what Stanford CoreNLP gave (tests/reference/treebank_tokens.json)."""

import json
from pathlib import Path

from experiments.vlm.evaluate.metrics.ptb_tokens import tokenize

REFERENCE = Path(__file__).parents[1] / "reference"
ALONE = json.loads((REFERENCE / "treebank_tokens.json").read_text("utf-8"))["tokens"]
CAPTIONS = json.loads((REFERENCE / "published_scores.json").read_text("utf-8"))["captions"]


def test_texts_have_the_tokens_of_the_published_tokenizer():
    assert {text: tokenize(text) for text in ALONE} == ALONE


def test_lists_of_captions_have_the_tokens_of_the_published_tokenizer():
    for captions in CAPTIONS[:2]:
        assert tokenize(captions["predictions"]) == captions["tokenized_predictions"]
        assert tokenize(captions["references"]) == captions["tokenized_references"]


def test_the_next_caption_is_seen():
    assert tokenize(["Platform D.", "The end"]) == ["platform d", "the end"]
    assert tokenize(["Platform D.", "red end"]) == ["platform d.", "red end"]


def test_texts_keep_their_number_and_their_nesting():
    assert tokenize([["a\nb", ""], [], "\u2028", ["😀", "\r\n"]]) == [["a b", ""], [], "", ["", ""]]
    assert tokenize([]) == []


def test_long_texts_of_one_kind_take_no_longer_than_they_are():
    for unit in ("a", "a-", "1,", "www.", "&eacute;", "a.", "x@", "<a ", "'", "(", ". ", "é"):
        assert isinstance(tokenize(unit * 3000), str)
