"""Byte-level BPE the slow way, and the Hugging Face tokenizer.json that holds the same merges as a tiktoken
file.
"""

import json

from tokenizers.pre_tokenizers import ByteLevel


def merge(token: bytes, ranks: dict[bytes, int], below: int | None = None) -> list[bytes]:
    """Merge the pair of lowest rank until none is left; only ranks lower than `below`."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 1:
        pairs = [(ranks.get(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
        known = [(rank, i) for rank, i in pairs if rank is not None and (below is None or rank < below)]
        if not known:
            break
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def printable() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable ones as they are, the others as the characters from 256 on."""
    alphabet = set(ByteLevel.alphabet())
    others = iter(range(256, 512))
    return {b: chr(b) if chr(b) in alphabet else chr(next(others)) for b in range(256)}


def definition(
    ranks: dict[bytes, int], specials: dict[str, int], split: str, plain: tuple[str, ...] = ()
) -> dict:
    """A tokenizer.json as Llama 3's: it splits by the same expression, trims offsets, and puts bos first.

    `plain` are not special.
    """
    spell = printable()
    text = {token: "".join(spell[b] for b in token) for token in ranks}
    merges = [
        tuple(text[part] for part in merge(token, ranks, rank))
        for token, rank in ranks.items()
        if len(token) > 1
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos = next(iter(specials))
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [
            {"id": id, "content": content, "special": content not in plain, **flags}
            for content, id in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                level,
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [specials[bos]], "tokens": [bos]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {text[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def dump(definition: dict) -> str:
    return json.dumps(definition, ensure_ascii=False)
