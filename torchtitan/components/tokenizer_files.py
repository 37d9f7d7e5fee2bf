"""A tokenizer as the files that transformers opens, whichever file it came from. Imports no torch.

    tokenizer.json            how text is tokenised: a published tokenizer.json without truncation
                              and padding; for tiktoken ranks the same merges, split by the same expression
    tokenizer_config.json     the class that takes tokenizer.json at its word, and which token has which role
    special_tokens_map.json   the same roles, for readers that look there

Next to a config.json of model_type qwen2, transformers 5.24 splits text as Qwen does whatever these files
say: open such a folder with PreTrainedTokenizerFast where its tokenizer is another's.

Ids stay what the job trained on: reserved tokens that were given a role bear its name, and rows that have no
name get one, since readers number added tokens without gaps.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchtitan.components.special_tokens import ROLES
from torchtitan.components.tokenizer import (
    LLAMA3_SPLIT,
    Tokenizer,
    find_file,
    is_special,
    load_tokenizer,
    read_json,
    read_ranks,
)
from torchtitan.config.shipped import shipped
from torchtitan.tools.disk import write_json

KEPT = ("model_max_length", "unk_token")  # keys of a tokenizer_config.json; the others are about its class


def write_tokenizer(path: str, folder: Path, named: Mapping[str, int] | None = None) -> None:
    """Write the tokenizer at `path` (a file or a folder, see load_tokenizer) into `folder`, which is there.

    named: further roles, such as image_token, and their ids. Raises ConfigError as load_tokenizer does.
    """
    file, tokenizer = find_file(shipped(path)), load_tokenizer(path)
    if file.suffix == ".json":
        definition, config = read_json(file, {}), read_json(file.with_name("tokenizer_config.json"), {})
    else:
        definition, config = from_ranks(read_ranks(file), tokenizer), {}
    write_json(folder / "tokenizer.json", rename(definition, tokenizer))
    roles = _roles(tokenizer, config)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: config[key] for key in KEPT if key in config},
        **roles,
        "extra_special_tokens": {role: tokenizer.spellings[id] for role, id in (named or {}).items()},
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", {role: text for role, text in roles.items() if text})


def _roles(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token (None where there is none), eos_token and pad_token by their spellings."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    # A padding without a name shares that of another role as published, whose id is not the one we pad with.
    spellings = {role: tokenizer.spellings.get(id) for role, id in ids.items() if id is not None}
    return {"bos_token": None} | {role: text or config.get(role) for role, text in spellings.items()}


def rename(definition: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json with the special tokens as `tokenizer` has them, cut and padded nowhere."""
    published = {token["id"]: token for token in definition.get("added_tokens", [])}
    vocab, added = dict(definition["model"]["vocab"]), []
    roles = {getattr(tokenizer, role) for role in ROLES}
    for id in sorted({*published, *range(tokenizer.backend.rows, tokenizer.rows)}):
        spelling = tokenizer.spellings.get(id, f"<|unnamed_{id}|>")
        token = published.get(id, {"id": id, "content": None})
        if token["content"] in vocab and token["content"] != spelling:
            vocab[spelling] = vocab.pop(token["content"])
        if token["content"] != spelling:
            token = _special(id, spelling)
        added.append(token | {"special": is_special(token) or id in roles})
    model = definition["model"] | {"vocab": vocab}
    return definition | {"added_tokens": added, "model": model, "truncation": None, "padding": None}


def from_ranks(ranks: dict[bytes, int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of tiktoken ranks that are split as Llama 3 does, without its special tokens.

    As published with Llama 3: a word that is a token is that token, merges or not, and bos comes first.
    """
    spell = byte_spellings()
    text = {token: "".join(spell[byte] for byte in token) for token in ranks}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level if tokenizer.bos_id is None else _begin_with(tokenizer.bos_id, tokenizer),
        "decoder": level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {text[token]: rank for token, rank in ranks.items()},
            "merges": [[text[left], text[right]] for left, right in merges(ranks)],
        },
    }


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Pairs of tokens that join to a token, in the order of its rank: tiktoken joins any of them."""
    for token in sorted(ranks, key=ranks.__getitem__):
        for i in range(1, len(token)):
            if token[:i] in ranks and token[i:] in ranks:
                yield token[:i], token[i:]


def byte_spellings() -> dict[int, str]:
    """Byte-level BPE writes printable bytes as themselves, the others as characters from 256 on."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable, others = set(ByteLevel.alphabet()), iter(range(256, 512))
    return {byte: chr(byte) if chr(byte) in printable else chr(next(others)) for byte in range(256)}


def _begin_with(bos_id: int, tokenizer: Tokenizer) -> dict[str, Any]:
    bos = tokenizer.spellings[bos_id]
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _special(id: int, spelling: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": spelling, **flags, "special": True}
