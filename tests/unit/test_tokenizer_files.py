"""A tokenizer that was written opens in stock transformers and gives every text the ids it was trained on."""

import base64
import functools
import json
import random
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import bpe
from torchtitan.components.special_tokens import ROLES
from torchtitan.components.tokenizer import LLAMA3_SPLIT, load_tokenizer
from torchtitan.components.tokenizer_files import write_tokenizer

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "assets/tokenizer"
PLAIN = {"add_special_tokens": False, "split_special_tokens": True}  # a text is only text, as for us
LOOK_ALIKES = ["<|image|>", "<|im_end", "|>", "<|eot_id|>", "<s>", "</s>", "<|reserved_special_token_9|>"]
LOOK_ALIKES += ["<|", "<|end_of_text|>", "<|image_pad|>", "<think>", "<|fim_prefix|>", "<unused0>"]
SPACES = [" ", "   ", "\t", "\n", "\r\n\n", "\u00a0", "\u3000", "\u200d", "e\u0301", "1", "'s", "'LL", "."]
BLOCKS = ((32, 0x250), (0x300, 0x2000), (0x3000, 0xA000), (0xAC00, 0xD7A4), (0x1F300, 0x1FAFF))


def ranks_of(file: Path) -> dict[bytes, int]:
    lines = (line.split() for line in file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


RANKS = ranks_of(SHIPPED / "tokenizer.model")


@functools.cache
def mixed_text(size: int) -> str:
    """`size` characters and more: code, many scripts, emoji, white space, what looks like special tokens."""
    chance = random.Random("mixed")
    files = sorted(REPOSITORY.glob("torchtitan/**/*.py"))
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)[: size // 4]
    letters = (chr(chance.randrange(*chance.choice(BLOCKS))) for _ in range(size // 2))
    scripts = "".join(letter + chance.choice(["", "", "", " ", "\n"]) for letter in letters)
    white = "".join(chance.choice(SPACES) for _ in range(size // 8))
    return code + scripts + white + "".join(chance.choice([*LOOK_ALIKES, " a"]) for _ in range(size // 40))


def save_ranks(folder: Path, ranks: dict[bytes, int], specials: list[str] | None = None) -> Path:
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    if specials is not None:
        (folder / "special_tokens.json").write_text(json.dumps(specials))
    return folder


def save_json(folder: Path, specials: dict[str, int], plain: tuple[str, ...] = (), **config: object) -> Path:
    definition = bpe.definition(RANKS, specials, LLAMA3_SPLIT, plain) | {"normalizer": {"type": "NFC"}}
    (folder / "tokenizer.json").write_text(bpe.dump(definition), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def qwen(folder: Path) -> Path:
    """As Qwen publishes: no bos, a token that looks special and is not flagged so, and its own class."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    names += ["<|image_pad|>", "<|fim_prefix|>", "<think>", "</think>"]
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"}
    config |= {"pad_token": "<|endoftext|>", "model_max_length": 512}
    specials = {name: 960 + i for i, name in enumerate(names)}
    return save_json(folder, specials, ("<|fim_prefix|>", "<think>", "</think>"), **config)


def reserving(folder: Path) -> Path:
    """Reserved tokens among the rows of the vocabulary itself, and a padding that is the end of a text."""
    specials = {"<s>": 960, "</s>": 961} | {f"<unused{i}>": 962 + i for i in range(9)}
    save_json(folder, specials, bos_token={"content": "<s>"}, eos_token="</s>", pad_token="</s>")
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["vocab"] |= specials
    (folder / "tokenizer.json").write_text(bpe.dump(definition), encoding="utf-8")
    return folder


def bare(folder: Path) -> Path:
    """A tiktoken file with no special tokens of its own, whose tokens follow no order of merging."""
    chance = random.Random("bare")
    letters = [bytes([byte]) for byte in range(256)]
    words = {bytes(chance.choices(b"ab c\n\xc3\xa9", k=chance.randint(2, 6))) for _ in range(300)}
    return save_ranks(folder, {token: rank for rank, token in enumerate([*letters, *sorted(words)])}, [])


KINDS = {"shipped": lambda folder: SHIPPED, "qwen": qwen, "reserving": reserving, "bare": bare}


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """(ours, theirs, folder)"""
    source = KINDS[request.param](tmp_path_factory.mktemp("source"))
    folder = tmp_path_factory.mktemp("written")
    ours = load_tokenizer(str(source))
    write_tokenizer(str(source), folder, {"image_token": ours.image_id})
    return ours, transformers.AutoTokenizer.from_pretrained(folder), folder


@pytest.mark.parametrize("size", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_mixed_text_gets_the_same_ids(written, size):
    """The larger one is more than a megabyte."""
    ours, theirs, _ = written
    text = mixed_text(size // 2)
    assert len(text.encode()) > size
    ids = ours.encode(text)
    assert theirs(text, **PLAIN)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids)


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.text() | st.sampled_from([*LOOK_ALIKES, "ab c", "é", "\n\n"])).map("".join))
def test_any_text_gets_the_same_ids(written, text):
    ours, theirs, _ = written
    assert theirs(text, **PLAIN)["input_ids"] == ours.encode(text)


def test_roles_have_the_same_ids_and_every_special_token_its_place(written):
    ours, theirs, folder = written
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.image_token_id == ours.image_id
    names = [theirs.convert_ids_to_tokens(id) for id in ours.spellings]
    assert dict(zip(ours.spellings, names, strict=True)) == ours.spellings
    again = load_tokenizer(str(folder))
    assert [getattr(again, role) for role in ROLES] == [getattr(ours, role) for role in ROLES]
    assert theirs.convert_tokens_to_ids("<|im_end|>") == ours.special_id("<|im_end|>")


def test_text_begins_with_bos_where_the_published_tokenizer_writes_one(written):
    ours, theirs, _ = written
    first = theirs("ab")["input_ids"][0]
    assert (first == ours.bos_id) == (ours.bos_id is not None)


def test_what_was_written_is_written_again_the_same(written, tmp_path):
    ours, _, folder = written
    write_tokenizer(str(folder), tmp_path, {"image_token": ours.image_id})
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "lfm2_vl"])
def test_whatever_the_model_beside_it_the_files_are_taken_at_their_word(tmp_path, model_type):
    write_tokenizer(str(SHIPPED), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = mixed_text(4_000)
    ids = theirs(text, **PLAIN)["input_ids"]
    assert ids == load_tokenizer(str(SHIPPED)).encode(text)
