"""Penn Treebank tokens of sentences, as the published caption scorers have them, without Java.

The scorers of COCO captions (pycocoevalcap) run `PTBTokenizer -preserveLines -lowerCase` of Stanford CoreNLP
3.4.1 on each sentence and drop punctuation. That is a lexer: at each position the rule (ptb_rules) that sees
the longest text wins, what must follow its token included.

Unusual, and kept: brackets stay, as `-lrb-`, since PUNCTUATION has them in capitals; a phone number or
"5 1/2" is one token with a no-break space inside; what no rule knows (emoji) is dropped.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from experiments.vlm.evaluate.metrics.ptb_rules import SHAPE, rules
from torchtitan.config.errors import UserError

PUNCTUATION = {*"'`.?!,:;-", "''", "``", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-"}

# Most text, recognised without trying all rules: plain words before a space or line end, and a comma or a
# period behind them.
_PLAIN = re.compile(
    r"(?!(?:cannot|gonna|wanna|gotta|lemme|gimme)\b)([A-Za-z]+)(?: |(?=\n|\Z))|([.,])(?=\n|\Z)|(,) ",
    re.IGNORECASE,
)

_ROUND = str.maketrans({"(": "-LRB-", ")": "-RRB-"})
_BRACKETS = str.maketrans(
    {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
)
_FRACTIONS = str.maketrans({"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"})
_CURRENCIES = str.maketrans({"¢": "cents", "£": "#", "¤": "$", "\x80": "$", "₠": "$", "€": "$"})
_QUOTES = str.maketrans(
    dict.fromkeys("\x91‘‛‹", "`")
    | dict.fromkeys("\x92’›", "'")
    | dict.fromkeys("\x93“«", "``")
    | dict.fromkeys('\x94”»"', "''")
)

CHANGES: dict[str, Callable[[str], str]] = {
    "": lambda token: token,
    "skip": lambda token: "",
    "line": lambda token: "\n",
    "period again": lambda token: token + ".",  # the period is also read as the end of the sentence
    "soft hyphen": lambda token: token.replace("\u00ad", "") or "-",
    "quotes": lambda token: re.sub("(?i)&apos;", "'", re.sub("(?i)&quot;", '"', token)).translate(_QUOTES),
    "ampersand": lambda token: re.sub("(?i)&amp;", "&", token),
    "angle": lambda token: {"&lt;": "<", "&gt;": ">"}.get(token.lower(), token),
    "one token": lambda token: token.replace(" ", "\u00a0"),
    "phone": lambda token: token.replace(" ", "\u00a0").translate(_ROUND),
    "round": lambda token: token.translate(_ROUND),
    "bracket": lambda token: token.translate(_BRACKETS),
    "fraction": lambda token: token.translate(_FRACTIONS),
    "currency": lambda token: token.translate(_CURRENCIES),
    "dash": lambda token: "--",
    "dashes": lambda token: "--" if len(token) in (3, 4) else token,
    "ellipsis": lambda token: "...",
}

Texts = str | Sequence["Texts"]


def tokenize(texts: Texts) -> Texts:
    """The tokens of each sentence, in lower case, without punctuation and with single spaces between.

    texts: a sentence, or lists of sentences, nested or not; the result has the same structure. Give all the
    sentences that the published scorer would see at once: it reads them as the lines of one text, and a few
    rules look into the next line (a final "D." keeps its period unless a word like "The" follows). Raises
    UserError for what is no text.
    """
    return _like(texts, iter(_lines("\n".join(" ".join(sentence.splitlines()) for sentence in _flat(texts)))))


def _flat(texts: Texts) -> Iterator[str]:
    if isinstance(texts, str):
        yield texts
    elif isinstance(texts, Mapping | bytes) or not isinstance(texts, Iterable):
        raise UserError(f"tokenize: {texts!r} where a text or a list of texts should be")
    else:
        for part in texts:
            yield from _flat(part)


def _like(texts: Texts, lines: Iterator[str]) -> Texts:
    return next(lines) if isinstance(texts, str) else [_like(part, lines) for part in texts]


def _lines(text: str) -> Iterator[str]:
    """The lines of `text`, tokenised."""
    words: list[str] = []
    for token in chain(treebank_tokens(text), ["\n"]):
        if token == "\n":
            line = " ".join(words).rstrip()  # a no-break space that ends the last token goes too, as there
            yield " ".join(word for word in line.split(" ") if word not in PUNCTUATION)
            words = []
        else:
            words.append(token.lower())


def treebank_tokens(text: str) -> Iterator[str]:
    """All tokens of `text` in order, with punctuation, letter case, and line ends as "\\n"."""
    shape, at = text.translate(SHAPE), 0
    while at < len(text):
        plain = _PLAIN.match(shape, at)
        if plain:
            yield plain[plain.lastindex or 0]
            at = plain.end()
        else:
            end, change = _longest(shape, at)
            if token := CHANGES[change](text[at:end]):
                yield token
            at = end


def _longest(shape: str, at: int) -> tuple[int, str]:
    """Where the token at `at` ends, and what becomes of it. What no rule knows is skipped."""
    seen, end, change = at, at + 1, "skip"
    for rule in rules():
        found = rule.pattern.match(shape, at)
        if found and found.end() > seen:
            seen, change = found.end(), rule.change
            end = found.end(found.lastindex or 0)
    return end, change
