"""Tokenizers from their files, with one of two backends, both byte-level BPE.

    tokenizer.model   tiktoken ranks, as Llama 3 ships them: a line holds base64(token) and its rank. Special
                      tokens follow the ranks: those of `special_tokens.json` next to it (a list in order of
                      ids), else Llama 3's 256
    tokenizer.json    Hugging Face `tokenizers`; `tokenizer_config.json` next to it names bos, eos and pad

The special tokens around plain text, and which ids they get: special_tokens.py. Imports no torch.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.components.special_tokens import Tokenizer
from torchtitan.config.errors import ConfigError
from torchtitan.config.shipped import shipped
from torchtitan.tools.hub import get_it

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = [  # as published with Llama 3.1: ids 128000 to 128255
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *(
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]


def load_tokenizer(path: str) -> Tokenizer:
    """Load `path`: a tokenizer file, or a folder that holds one. Raises ConfigError naming the file."""
    file = find_file(shipped(path))
    return load_tokenizers(file) if file.suffix == ".json" else load_tiktoken(file)


def find_file(path: Path) -> Path:
    """The tokenizer file at `path` or in that folder. Raises ConfigError where there is none."""
    if path.is_file():
        return path
    # tokenizer.json first: where both are there, tokenizer.model may be a SentencePiece file.
    for name in ("tokenizer.json", "tokenizer.model", "original/tokenizer.model"):
        if (path / name).is_file():
            return path / name
    missing = "holds no tokenizer.json or tokenizer.model" if path.is_dir() else "does not exist"
    raise ConfigError(f"model.tokenizer_path = {path} {missing}; {get_it(path)}")


class TiktokenBackend:
    """Plain text by tiktoken. `ranks`: bytes of a token -> its id."""

    def __init__(self, ranks: dict[bytes, int]):
        import tiktoken

        self.rows = len(ranks)
        self.encoding = tiktoken.Encoding(
            "tokenizer.model", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={}
        )
        self.encode = self.encoding.encode_ordinary

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See Backend; where tokens share a character, each covers it."""
        ids = self.encode(text)
        if not ids:
            return [], []
        utf8 = np.frombuffer(text.encode(), dtype=np.uint8)
        # of each byte: continuation bytes belong to the character before
        character = np.cumsum((utf8 & 0xC0) != 0x80) - 1
        ends = np.cumsum([len(token) for token in self.encoding.decode_tokens_bytes(ids)])
        first = character[np.concatenate([[0], ends[:-1]])]
        last = character[ends - 1]
        return ids, list(zip(first.tolist(), (last + 1).tolist(), strict=True))

    def decode(self, ids: list[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode(ids)


def load_tiktoken(file: Path) -> Tokenizer:
    """A `tokenizer.model`. Raises ConfigError where the file is not one."""
    ranks = read_ranks(file)
    spellings = read_json(file.with_name("special_tokens.json"), LLAMA3_SPECIALS)
    specials = {spelling: len(ranks) + i for i, spelling in enumerate(spellings)}
    return Tokenizer(TiktokenBackend(ranks), specials, {})


def read_ranks(file: Path) -> dict[bytes, int]:
    """Bytes of a token -> its id, of a `tokenizer.model`. Raises ConfigError where the file is not one."""
    ranks: dict[bytes, int] = {}
    try:
        for line in file.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise ConfigError(
            f"{file}, line {len(ranks) + 1} is not 'base64(token) rank': not a tiktoken file"
            " (a SentencePiece model? use its tokenizer.json)"
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise ConfigError(
            f"{file}: ranks must be 0, 1, 2, ... without a gap and hold all 256 single bytes; is the file "
            "cut short?"
        )
    return ranks


class TokenizersBackend:
    """Plain text by Hugging Face `tokenizers`."""

    def __init__(self, definition: dict[str, Any]):
        """`definition` is the content of a tokenizer.json."""
        from tokenizers import Tokenizer as HFTokenizer

        added = [token | {"special": is_special(token)} for token in definition["added_tokens"]]
        plain = {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
        self.tokenizer = HFTokenizer.from_str(json.dumps(inside(definition) | plain))
        self.tokenizer.encode_special_tokens = True  # as the characters they are written with
        self.rows = self.tokenizer.get_vocab_size(with_added_tokens=False)

    def __reduce__(self) -> tuple:
        # encode_special_tokens is not part of its state
        return TokenizersBackend, (json.loads(self.tokenizer.to_str()),)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without the special tokens that a model adds."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each its characters [first, last)."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int]) -> str:
        """The text, added tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def is_special(token: Mapping[str, Any]) -> bool:
    """Whether an added token is special: <|...|> is, whatever its flag says; others without the flag
    (<think>, runs of spaces) belong to plain text.
    """
    return token["special"] or bool(re.fullmatch(r"<\|.*\|>", token["content"]))


def inside(definition: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json for a text behind a special token, where bos, a chat marker or an image puts it.

    Some (Mistral's) write a space before what a whole string begins with, and only there.
    """
    steps = json.dumps({key: definition.get(key) for key in ("pre_tokenizer", "decoder")})
    always = json.loads(steps.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
    if always == json.loads(steps):
        return definition
    decoder = always["decoder"] or {}
    kept = [
        step for step in decoder.get("decoders", ()) if step["type"] != "Strip"
    ]  # it takes that space away
    return definition | always | ({"decoder": decoder | {"decoders": kept}} if kept else {})


def load_tokenizers(file: Path) -> Tokenizer:
    """A `tokenizer.json`. Raises ConfigError where it is not BPE, or `tokenizers` refuses it."""
    definition = read_json(file, {})
    model = definition.get("model", {}).get("type", "none")
    if model != "BPE":
        raise ConfigError(f"{file} holds a model of type {model}; only BPE is supported")
    config = read_json(file.with_name("tokenizer_config.json"), {})
    named = {
        f"{name}_id": token["content"] if isinstance(token, dict) else token
        for name in ("bos", "eos", "pad")
        if (token := config.get(f"{name}_token", "")) != ""
    }
    definition.setdefault("added_tokens", [])
    try:
        backend = TokenizersBackend(definition)
    except Exception as error:  # `tokenizers` raises Exception itself
        raise ConfigError(f"{file}: {error}") from None
    added = definition["added_tokens"]
    plain = [token["id"] for token in added if not is_special(token)]
    return Tokenizer(backend, {token["content"]: token["id"] for token in added}, named, plain)


def read_json(file: Path, default: Any) -> Any:
    """The file's content, else `default`. Raises ConfigError where it is not JSON of the default's type."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if type(content) is not type(default):
        raise ConfigError(f"{file} does not hold {'a list' if isinstance(default, list) else 'an object'}")
    return content
