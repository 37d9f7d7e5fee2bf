"""Metrics of answers give what the published scorers gave (tests/reference/published_scores.json)."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from experiments.vlm.evaluate.metrics import METRICS, TOKENIZED, bootstrap_interval, tokenize
from experiments.vlm.evaluate.metrics.meteor import missing as missing_for_meteor
from experiments.vlm.evaluate.metrics.mmmu import parse_choice, parse_open
from experiments.vlm.evaluate.task_scores import score as score_of
from experiments.vlm.evaluate.task_scores import summarise
from experiments.vlm.evaluate.tasks import TASKS
from torchtitan.config.errors import UserError

PUBLISHED = json.loads((Path(__file__).parents[1] / "reference" / "published_scores.json").read_text("utf-8"))
OPTIONS = ("case_sensitive", "all_choices", "index2ans")
CAPTIONS = [
    (number, metric)
    for number, captions in enumerate(PUBLISHED["captions"])
    for metric in captions["expected"]
]
needs_meteor = pytest.mark.skipif(bool(missing_for_meteor()), reason=missing_for_meteor())


@pytest.mark.parametrize("number", range(len(PUBLISHED["answers"])))
def test_answers_score_as_published(number):
    case = PUBLISHED["answers"][number]
    options = {name: case[name] for name in OPTIONS if name in case}
    score = METRICS[case["metric"]](case["predictions"], case["references"], **options)
    if "per_sample" in case:
        assert score.per_sample == pytest.approx(case["per_sample"], abs=1e-4)
        assert score.overall == pytest.approx(sum(case["per_sample"]) / len(case["per_sample"]), abs=1e-4)
    if "overall" in case:
        assert score.overall == pytest.approx(case["overall"], abs=1e-4)
    if "parsed" in case:
        assert score.parsed == case["parsed"]


@pytest.mark.parametrize(
    "number, metric",
    [
        pytest.param(*case, marks=[pytest.mark.slow, needs_meteor] if case[1] == "meteor" else [])
        for case in CAPTIONS
    ],
)
def test_captions_score_as_published(number, metric):
    case = PUBLISHED["captions"][number]
    score = METRICS[metric](tokenize(case["predictions"]), tokenize(case["references"]))
    expected = case["expected"][metric]
    assert score.overall == pytest.approx(expected["corpus"], abs=1e-9)
    if "per_sample" in expected:
        assert score.per_sample == pytest.approx(expected["per_sample"], abs=1e-9)


@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"meteor"}))
@pytest.mark.parametrize(
    "prediction, references",
    [
        ("", ["a cat"]),
        ("a cat", [""]),
        ("", [""]),
        ("日本 😀 é\u0301 \x00", ["ß İ \ud800"]),
        ("a", ["a", "a"]),
        ("5", "5"),
    ],
)
def test_odd_texts_have_a_score(metric, prediction, references):
    options = {"all_choices": [["A", "B"]] * 2, "index2ans": [{"A": "", "B": "é"}] * 2}
    options = options if metric == "mmmu_multiple_choice" else {}
    score = METRICS[metric]([prediction] * 2, [references] * 2, **options)
    assert len(score.per_sample) == 2 and all(map(math.isfinite, [score.overall, *score.per_sample]))


def distance(left: list[str], right: list[str]) -> int:
    """Levenshtein's, by its definition."""
    if not left or not right:
        return len(left) + len(right)
    return min(
        distance(left[1:], right) + 1,
        distance(left, right[1:]) + 1,
        distance(left[1:], right[1:]) + (left[0] != right[0]),
    )


def test_word_accuracy_counts_the_fewest_edits_over_all_words():
    rng = random.Random(0)
    texts = [[rng.choice("407") for _ in range(rng.randint(1, 5))] for _ in range(60)]
    told, right = texts[:30], texts[30:]
    score = METRICS["word_accuracy"](
        [" ".join(words) for words in told], [" ".join(words) for words in right]
    )
    edits = [distance(*pair) for pair in zip(told, right, strict=True)]
    assert score.overall == pytest.approx(100 * (1 - sum(edits) / sum(map(len, right))))
    assert score.per_sample == pytest.approx(
        [100 * max(0, 1 - wrong / len(words)) for wrong, words in zip(edits, right, strict=True)]
    )
    assert METRICS["word_accuracy"](["4 0 7 7"], ["4 0 7"]).overall == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    "predictions, references, wrong",
    [
        (["a"], [["a"], ["b"]], "anls: 1 predictions, but references of 2 samples"),
        (["a", "b"], [["a"], []], "anls: sample 1 has no reference"),
        ([None], [["a"]], "anls: sample 0 has None where a text should be"),
        ([], [], "anls: no predictions"),
        ("a", "a", "anls: give a list of predictions"),
        ({"7": ["a"]}, {"7": ["a"]}, "anls: give a list of predictions .* not a table"),
        (["a"], [None], "anls: sample 0 has None where references should be"),
        (["a"], [{"caption": "a"}], "anls: sample 0 has {'caption': 'a'} where references should be"),
    ],
)
def test_samples_that_do_not_fit_are_one_clear_error(predictions, references, wrong):
    with pytest.raises(UserError, match=wrong):
        METRICS["anls"](predictions, references)


@pytest.mark.parametrize("texts", [[None], {"7": ["a"]}, [["a", b"b"]]], ids=str)
def test_what_is_no_text_has_no_tokens(texts):
    with pytest.raises(UserError, match="tokenize: .* where a text or a list of texts should be"):
        tokenize(texts)


def test_letter_case_counts_where_asked():
    assert METRICS["exact_match"](["Abc"], ["abc"]).overall == 0
    assert METRICS["exact_match"](["Abc"], ["abc"], case_sensitive=False).overall == 100
    assert METRICS["anls"](["Abc"], ["abc"]).overall == 100
    assert METRICS["anls"](["Abc"], ["abc"], case_sensitive=True).overall == pytest.approx(200 / 3)


def test_anls_counts_at_its_threshold_and_not_below():
    assert METRICS["anls"](["abcd", "abc"], ["abxy", "axy"]).per_sample == [50, 0]
    assert METRICS["anls"](["abc"], ["axy"], threshold=0.3).overall == pytest.approx(100 / 3)


def edits(left, right):
    """Levenshtein distance by its definition."""
    if not left or not right:
        return len(left) + len(right)
    swapped = edits(left[1:], right[1:]) + (left[0] != right[0])
    return min(swapped, edits(left[1:], right) + 1, edits(left, right[1:]) + 1)


def test_anls_is_the_edit_distance_by_its_definition():
    texts = ["".join(text) for length in range(4) for text in itertools.product("ab", repeat=length)] + [
        "日é😀a"
    ]
    for left, right in itertools.product(texts, repeat=2):
        expected = 100 * (1 - edits(left, right) / max(len(left), len(right), 1))
        assert METRICS["anls"]([left], [right], threshold=0.0).overall == pytest.approx(expected)


def test_relaxed_accuracy_takes_its_tolerance():
    assert METRICS["relaxed_accuracy"](["110"], ["100"]).overall == 0
    assert METRICS["relaxed_accuracy"](["110"], ["100"], max_relative_change=0.1).overall == 100


def test_vqa_accuracy_needs_the_very_text_where_all_people_agree():
    assert METRICS["vqa_accuracy"](["The cat."], [["cat"] * 9 + ["dog"]]).overall == 100
    assert METRICS["vqa_accuracy"](["The cat."], [["cat"] * 10]).overall == 0


def test_a_choice_is_the_last_one_named_by_bracket_then_letter_then_text():
    letters, texts = ["A", "B"], {"A": "red fox", "B": "dog"}
    assert parse_choice("(A) is wrong, B or (B)", letters, texts) == "B"
    assert parse_choice("B before A here", letters, texts) == "A"
    assert parse_choice("it is a Red Fox, I am sure", letters, texts) == "A"
    assert parse_choice("a red fox", letters, texts) is None  # five words and fewer need a letter


def test_a_response_without_a_choice_draws_one_from_seed_and_number_alone():
    options = {"all_choices": [["A", "B", "C"]] * 300, "index2ans": [{"A": "x"}] * 300}
    score = METRICS["mmmu_multiple_choice"](["?"] * 300, ["A"] * 300, **options)
    assert score == METRICS["mmmu_multiple_choice"](["?"] * 300, ["A"] * 300, **options)
    assert 20 < score.overall < 47  # a third, within five standard deviations
    with pytest.raises(UserError, match="all_choices needs an entry"):
        METRICS["mmmu_multiple_choice"](["?"], ["A"], all_choices=["AB"], index2ans=[{"A": "x"}])


def test_an_open_answer_is_what_stands_behind_the_signal_words():
    assert parse_open("I see 3 dogs.\nSo the answer is about 12.5 m") == ["about 12.5 m", 12.5]
    assert parse_open("x = 5") == [5.0]
    assert parse_open("B") == [" b", "b "]


def test_a_corpus_of_one_has_no_rare_words_for_cider():
    assert METRICS["cider"](["a cat"], [["a cat"]]).overall == 0
    assert METRICS["cider"](
        ["a b c d e", "v w x y z"], [["a b c d e"], ["v w x y z"]]
    ).overall == pytest.approx(10)


def test_meteor_without_java_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="^meteor needs Java"):
        METRICS["meteor"](["a"], [["a"]])


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a shell script in the place of Java, and an empty package in that of the one with the jar."""
    package = tmp_path / "pycocoevalcap"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def write(script):
        (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "java").chmod(0o755)

    return write


def test_meteor_scores_by_the_lines_of_its_program(program, tmp_path):
    program(f"""tee {tmp_path}/seen | while read -r kind line; do
        if [ "$kind" = SCORE ]; then echo "counts of $line"; else printf '0.25\\n0.5\\n0.375\\n'; fi; done""")
    score = METRICS["meteor"](["a ||| b", ""], [["a", "b\nc"], "\u00a0é"])
    assert (score.overall, score.per_sample) == (0.375, [0.25, 0.5])
    assert (tmp_path / "seen").read_text("utf-8").split("\n") == [
        "SCORE ||| a ||| b c ||| a b",
        "SCORE ||| \u00a0é ||| ",
        "EVAL ||| counts of ||| a ||| b c ||| a b ||| counts of ||| \u00a0é |||",
        "",
    ]


def test_meteor_whose_program_ends_early_is_one_clear_error(program):
    program("exit 1")
    with pytest.raises(UserError, match="^meteor: its program ended early; run `java "):
        METRICS["meteor"](["a" * 100_000] * 3, [["a"]] * 3)


def test_every_metric_of_captions_takes_tokens():
    assert {metric for _, metric in CAPTIONS} == TOKENIZED


def test_the_bootstrap_interval_is_that_of_the_normal_distribution_for_many_samples():
    scores = np.random.default_rng(1).normal(3, 2, size=4000)
    interval = bootstrap_interval(scores)
    error = 1.96 * scores.std() / math.sqrt(len(scores))
    assert interval.value == pytest.approx(scores.mean())
    assert interval.high - interval.value == pytest.approx(error, rel=0.1)
    assert interval.value - interval.low == pytest.approx(error, rel=0.1)


def test_the_bootstrap_interval_depends_on_scores_and_seed_and_not_on_their_order():
    scores = [0.0, 100.0, 100.0, 30.0, 60.0] * 7
    assert bootstrap_interval(scores) == bootstrap_interval(sorted(scores))
    assert bootstrap_interval(scores) != bootstrap_interval(scores, seed=1)
    assert bootstrap_interval([5.0]) == bootstrap_interval([5.0] * 9)
    with pytest.raises(UserError, match="needs scores"):
        bootstrap_interval([])


def test_the_bootstrap_interval_widens_with_confidence():
    scores = [0.0, 1.0] * 20
    narrow, wide = bootstrap_interval(scores, confidence=0.5), bootstrap_interval(scores, confidence=0.99)
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high


@pytest.mark.parametrize("metric", ["bleu_1", "bleu_2", "word_accuracy"])
def test_the_interval_of_what_is_counted_over_all_samples_is_of_that_over_samples_drawn_anew(metric):
    said = ["a b c d e f g h", "a cat", "one two"]
    right = [["a b c x e f g h"], ["a dog sits"], ["one two"]]
    score = METRICS[metric]
    every = []  # of 27 draws of three samples, each as likely
    for draw in itertools.product(range(3), repeat=3):
        every.append(score([said[i] for i in draw], [right[i] for i in draw]).overall)
    interval = bootstrap_interval(score(said, right), confidence=0.6, resamples=50_000)
    assert interval.value == pytest.approx(score(said, right).overall)
    low, high = np.quantile(every, [0.2, 0.8], method="inverted_cdf")
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))
    assert not math.isclose(interval.value, np.mean(score(said, right).per_sample), rel_tol=0.01)


def test_the_interval_of_perplexity_is_of_that_of_all_tokens():
    long, short = {"logprob": -100.0, "tokens": 100}, {"logprob": -10.0, "tokens": 1}
    found, _ = score_of(TASKS["perplexity"], [], [long] * 30 + [short] * 10)
    told = summarise(found)["perplexity"]
    assert told["value"] == pytest.approx(math.exp(3100 / 3010))
    assert math.e < told["low"] < told["value"] < told["high"] < 3.1  # the documents' mean is 5,509
