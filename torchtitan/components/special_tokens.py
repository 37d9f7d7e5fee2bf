"""Special tokens: which a tokenizer has, which id each role and chat marker gets, and how text avoids them.

Unusual here: what is written in a dataset's text is always text. The spelling of a special token inside it is
encoded as plain characters, and only `special_id` and the role ids (`image_id`, ...) give special tokens. A
role or chat marker that a file does not know takes one of the file's reserved ids, lowest first, else a new
row; only bos stays away where it is not published (Qwen). No two roles have the same id, so that a label mask
for padding can never hide an end of text. Imports no torch.
"""

import re
from collections.abc import Collection, Iterator
from itertools import groupby
from typing import Protocol

# Attribute of Tokenizer -> spellings: the first that the file knows is taken, the first of all names a
# new token.
ROLES = {
    "eos_id": ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>"),
    "bos_id": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
    "pad_id": ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]"),
    "image_id": ("<|image|>", "<|image_pad|>", "<image>", "<image_soft_token>", "<IMG_CONTEXT>"),
    "begin_image_id": (
        "<|begin_of_image|>",
        "<|vision_start|>",
        "<|image_start|>",
        "<start_of_image>",
        "<img>",
    ),
    "end_image_id": ("<|end_of_image|>", "<|vision_end|>", "<|image_end|>", "<end_of_image>", "</img>"),
}
CHAT_MARKERS = ("<|im_start|>", "<|im_end|>")  # every tokenizer has them
RESERVED = re.compile(r"<\|?(reserved|unused)\D*\d+\|?>")
LONGEST_RUN = 25_000  # characters; tiktoken's regex panics on a run of a million spaces
LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST_RUN + 1},}}|(?<!\s)\s{{{LONGEST_RUN + 1},}}")
SURROGATE = re.compile("[\ud800-\udfff]")


class Backend(Protocol):
    """Plain text to ids and back (tokenizer.py); it knows no special tokens."""

    rows: int  # ids below it are tokens of plain text

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each the characters [start, end) it stands for."""

    def decode(self, ids: list[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""


class Tokenizer:
    """Text to token ids and back: a backend that knows plain text, and the special tokens around it.

    Picklable, so that loader workers get it.
    """

    vocab_size: int  # a multiple of 64; every id is below it
    hidden: dict[int, str]  # special tokens, which an answer does not show, with their spelling
    bos_id: int | None  # None: the model knows none, and its documents begin without
    eos_id: int
    pad_id: int
    image_id: int
    begin_image_id: int
    end_image_id: int

    def __init__(
        self,
        backend: Backend,
        specials: dict[str, int],
        named: dict[str, str | None],
        plain: Collection[int] = (),
    ):
        """`specials`: spelling -> id as the file has them, of which `plain` belong to text (<think>).

        `named`: role -> spelling, where the file says so; None where it says that there is none.
        """
        self.backend = backend
        self.new_ids: set[int] = set()  # ids that the file gave to nothing: reserved ones and new rows
        self.specials = dict(specials)
        self.rows = max(backend.rows, max(specials.values(), default=-1) + 1)
        taken: set[int] = set()
        for role, spellings in ROLES.items():
            candidates = [named.get(role), *spellings]
            known = [
                self.specials[s] for s in candidates if s in self.specials and self.specials[s] not in taken
            ]
            if role == "bos_id" and (not known or named.get(role, "") is None):
                self.bos_id = None
                continue
            id = known[0] if known else self.add(spellings[0])
            setattr(self, role, id)
            self.specials.setdefault(spellings[0], id)
            taken.add(id)
        for spelling in CHAT_MARKERS:
            if spelling not in self.specials:
                self.add(spelling)
        self.spellings = {id: spelling for spelling, id in reversed(self.specials.items())}
        shown = set(plain) - taken
        self.hidden = {id: spelling for id, spelling in self.spellings.items() if id not in shown}
        self.vocab_size = -(-self.rows // 64) * 64

    def add(self, spelling: str) -> int:
        """A new special token: on the lowest reserved id, else on a new row."""
        reserved = [(id, s) for s, id in self.specials.items() if RESERVED.fullmatch(s)]
        if reserved:
            id, old = min(reserved)
            del self.specials[old]
        else:
            id = self.rows
            self.rows += 1
        self.new_ids.add(id)
        # A role named otherwise by the file may already own this spelling (Qwen's eos as padding): the new
        # one stays nameless.
        self.specials.setdefault(spelling, id)
        return id

    def special_id(self, spelling: str) -> int | None:
        """The id of a special token; None where this tokenizer has none of that spelling."""
        return self.specials.get(spelling)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no bos or eos; a special token's spelling inside it is ordinary text.

        A lone surrogate becomes U+FFFD; all else comes back from `decode`.
        """
        return [id for _, piece in pieces(text) for id in self.backend.encode(piece)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each the characters [first, last) of the text that it covers; tokens that share a
        character all cover it.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for start, piece in pieces(text):
            piece_ids, piece_spans = self.backend.encode_with_offsets(piece)
            ids += piece_ids
            spans += [(start + first, start + last) for first, last in piece_spans]
        return ids, spans

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens by their spelling; ids that mean nothing are left out."""
        texts = []
        for special, group in groupby(ids, key=lambda id: id in self.spellings or id >= self.backend.rows):
            run = list(group)
            texts.append(
                "".join(self.spellings.get(id, "") for id in run) if special else self.backend.decode(run)
            )
        return "".join(texts)


def pieces(text: str) -> Iterator[tuple[int, str]]:
    """(start, text) in order.

    Runs with (or without) white space of more than LONGEST_RUN characters are cut.
    """
    if not text.isascii():
        text = SURROGATE.sub("\ufffd", text)  # json gives lone surrogates; UTF-8 has none
    cuts = [0]
    if len(text) > LONGEST_RUN:
        for run in LONG_RUN.finditer(text):
            cuts += [*range(run.start(), run.end(), LONGEST_RUN), run.end()]
    cuts.append(len(text))
    yield from ((a, text[a:b]) for a, b in zip(cuts, cuts[1:], strict=False) if a < b)
