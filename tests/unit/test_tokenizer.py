import base64
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from experiments.vlm.world.caption import describe
from experiments.vlm.world.scene import GLYPHS, sees_scene
from tests.reference import bpe
from torchtitan.components.special_tokens import LONGEST_RUN, ROLES
from torchtitan.components.tokenizer import LLAMA3_SPLIT, load_tokenizer
from torchtitan.config.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "assets/tokenizer"
RANKS = {
    base64.b64decode(t): int(r)
    for t, r in (line.split() for line in (SHIPPED / "tokenizer.model").read_bytes().splitlines())
}
SPECIALS = {
    spelling: len(RANKS) + i
    for i, spelling in enumerate(json.loads((SHIPPED / "special_tokens.json").read_text()))
}
SPELLINGS = [s for names in ROLES.values() for s in names] + [
    "<|im_start|>",
    "<|eot_id|>",
    "<|reserved_special_token_3|>",
]
TEXTS = st.lists(
    st.text()
    | st.sampled_from([*SPELLINGS, " ", "\n\n", "e\u0301", "👩\u200d👩\u200d👧", "zwölf Boxkämpfer", "12345"])
).map("".join)


def write_json(folder: Path, specials: dict[str, int], plain: tuple[str, ...] = (), **config: object) -> str:
    (folder / "tokenizer.json").write_text(
        bpe.dump(bpe.definition(RANKS, specials, LLAMA3_SPLIT, plain)), encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def write_model(folder: Path, ranks: dict[bytes, int]) -> str:
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return str(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def tiktoken_backed():
    return load_tokenizer(str(SHIPPED))


@pytest.fixture(scope="module")
def hf_backed(tmp_path_factory):
    return load_tokenizer(write_json(tmp_path_factory.mktemp("hf"), SPECIALS))


@pytest.fixture(scope="module", params=["tiktoken_backed", "hf_backed"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A file with Llama 3's 128,000 ranks: bytes, then pairs and triples that no test text holds."""
    tokens = [bytes([b]) for b in range(256)] + [b"\xff" + i.to_bytes(3, "big") for i in range(127_744)]
    return load_tokenizer(
        write_model(tmp_path_factory.mktemp("llama3"), {token: rank for rank, token in enumerate(tokens)})
    )


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_special_tokens_written_in_a_text_are_plain_text(tokenizer, text):
    assert max(tokenizer.encode(text), default=0) < len(RANKS)


@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_both_backends_give_the_ids_of_merging_by_hand(tiktoken_backed, hf_backed, text):
    words = regex.findall(LLAMA3_SPLIT, text)
    expected = [RANKS[part] for word in words for part in bpe.merge(word.encode(), RANKS)]
    assert tiktoken_backed.encode(text) == expected
    assert hf_backed.encode(text) == expected


@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_offsets_are_those_of_the_hugging_face_library(tiktoken_backed, hf_backed, text):
    definition = bpe.definition(RANKS, SPECIALS, LLAMA3_SPLIT) | {
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
    }
    reference = HFTokenizer.from_str(bpe.dump(definition)).encode(text)
    assert tiktoken_backed.encode_with_offsets(text) == (reference.ids, reference.offsets)
    assert hf_backed.encode_with_offsets(text) == (reference.ids, reference.offsets)


def test_tokens_that_share_a_character_all_hold_it(tokenizer):
    ids, spans = tokenizer.encode_with_offsets("a👩b")
    assert tokenizer.decode(ids) == "a👩b"
    assert spans == [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3)]


def test_lone_surrogates_become_replacement_characters(tokenizer):
    text = json.loads(r'"a\ud800b\udc00"')
    assert tokenizer.decode(tokenizer.encode(text)) == "a\ufffdb\ufffd"
    assert tokenizer.encode_with_offsets(text)[1][-1] == (3, 4)


@pytest.mark.parametrize(
    ("unit", "times"),
    [(" ", 1_000_000), ("\n", 1_000_000), ("a", 1_000_000), ("中文", 100_000), ("a red star ", 50_000)],
)
def test_very_long_texts_come_back(tokenizer, unit, times):
    """In seconds: what grows with the square of the length would take days."""
    text = "begin" + unit * times + "end"
    ids, spans = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(ids) == text
    assert spans[-1][1] == len(text)


def test_long_texts_without_long_runs_are_encoded_as_a_whole(tokenizer):
    text = " ".join(describe(sees_scene(random.Random(i), False)) for i in range(2000))
    assert len(text) > 2 * LONGEST_RUN
    assert tokenizer.encode(text) == tokenizer.backend.encode(text)


def test_decode_spells_special_tokens_and_skips_empty_rows(tokenizer):
    ids = [
        tokenizer.bos_id,
        *tokenizer.encode("a red star"),
        tokenizer.special_id("<|im_end|>"),
        5000,
        tokenizer.eos_id,
    ]
    assert tokenizer.decode(ids) == "<|begin_of_text|>a red star<|im_end|><|end_of_text|>"


def test_the_shipped_file_has_small_ids_and_names_for_every_role(tiktoken_backed):
    assert tiktoken_backed.vocab_size == 1024
    roles = [getattr(tiktoken_backed, role) for role in ROLES]
    assert len(set(roles)) == len(ROLES)
    assert {tiktoken_backed.special_id(names[0]) for names in ROLES.values()} == set(roles)


def test_captions_of_the_world_are_one_token_a_word(tiktoken_backed):
    for i in range(3000):
        caption = describe(sees_scene(random.Random(i), False))
        words_marks_and_glyphs = regex.findall(r'[a-z]+|[,"]|[A-Z0-9]', caption)
        assert len(tiktoken_backed.encode(caption)) == len(words_marks_and_glyphs), caption


def test_glyphs_are_never_merged(tiktoken_backed):
    assert all(len(tiktoken_backed.encode(a + b)) == 2 for a in GLYPHS for b in GLYPHS)


def test_llama3_ids_are_the_published_ones_and_new_names_take_reserved_ids(llama3):
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (128000, 128001, 128004)
    assert llama3.special_id("<|start_header_id|>") == 128006
    assert llama3.special_id("<|end_header_id|>") == 128007
    assert llama3.special_id("<|eot_id|>") == 128009
    assert (llama3.image_id, llama3.begin_image_id, llama3.end_image_id) == (128002, 128003, 128005)
    assert (llama3.special_id("<|im_start|>"), llama3.special_id("<|im_end|>")) == (128011, 128012)
    assert llama3.special_id("<|reserved_special_token_247|>") == 128255
    assert llama3.vocab_size == 128256


QWEN = {
    **{
        "<|endoftext|>": 960,
        "<|im_start|>": 961,
        "<|im_end|>": 962,
        "<|vision_start|>": 963,
        "<|vision_end|>": 964,
    },
    **{"<|image_pad|>": 965, "<|fim_prefix|>": 966, "<think>": 967},
}


def test_qwen_names_are_known_and_every_role_has_an_id_of_its_own(tmp_path):
    path = write_json(
        tmp_path, QWEN, bos_token=None, eos_token="<|endoftext|>", pad_token={"content": "<|endoftext|>"}
    )
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_id, tokenizer.image_id, tokenizer.begin_image_id, tokenizer.end_image_id) == (
        960,
        965,
        963,
        964,
    )
    # a row of its own: nothing is reserved in this file
    assert (tokenizer.pad_id, tokenizer.rows) == (968, 969)
    assert tokenizer.special_id("<|im_end|>") == 962
    assert tokenizer.special_id("<|eot_id|>") is None
    assert tokenizer.vocab_size == 1024


@pytest.mark.parametrize("config", [{}, {"bos_token": None}], ids=["not named", "named as none"])
def test_a_tokenizer_without_bos_gives_none_and_no_row_to_it(tmp_path, config):
    specials = QWEN | ({"<s>": 968} if config else {})  # a token that others begin with, but not this model
    tokenizer = load_tokenizer(write_json(tmp_path, specials, eos_token="<|im_end|>", **config))
    assert tokenizer.bos_id is None
    assert tokenizer.special_id("<|begin_of_text|>") is None
    assert tokenizer.rows == 960 + len(specials) + 1  # that of the padding


def test_a_tiktoken_file_whose_specials_hold_no_bos_has_none(tmp_path):
    write_model(tmp_path, {bytes([b]): b for b in range(256)})
    (tmp_path / "special_tokens.json").write_text('["<|endoftext|>", "<|im_start|>", "<|im_end|>"]')
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.rows) == (None, 256, 263)


def test_markers_in_angle_bars_are_plain_text_but_plain_added_tokens_are_kept(tmp_path):
    tokenizer = load_tokenizer(write_json(tmp_path, QWEN, plain=("<|fim_prefix|>", "<think>")))
    text = "<|fim_prefix|> <think>no</think> <|image_pad|>"
    ids = tokenizer.encode(text)
    assert [id for id in ids if id >= 960] == [967]
    assert tokenizer.decode(ids) == text
    hidden = tokenizer.hidden.values()
    assert "<think>" not in hidden and {"<|fim_prefix|>", "<|image_pad|>", "<|im_end|>"} <= {*hidden}


def test_the_instruction_model_may_name_another_end_and_padding(tmp_path):
    tokenizer = load_tokenizer(write_json(tmp_path, QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>"))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (962, 960)


def test_ids_stay_below_a_vocabulary_that_is_a_multiple_of_64(tmp_path):
    specials = {"<s>": 960} | {f"<extra_{i}>": 961 + i for i in range(63)}  # 1024 rows, full
    tokenizer = load_tokenizer(write_json(tmp_path, specials))
    ids = [getattr(tokenizer, role) for role in ROLES]
    assert tokenizer.vocab_size == 1088
    assert max(ids) < tokenizer.vocab_size
    assert len(set(ids)) == len(ids)
    assert tokenizer.bos_id == 960


def test_a_tokenizer_travels_to_worker_processes(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    text = "a big red star <|image|> <|end_of_text|>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.image_id == tokenizer.image_id


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("strips", [False, True])
def test_pieces_between_special_tokens_get_the_ids_of_the_whole_string(tmp_path, scheme, strips):
    """As Llama 2's and Mistral's files spell spaces."""
    import tokenizers as library

    made = library.Tokenizer(library.models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = library.pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    made.decoder = library.decoders.Metaspace("▁", prepend_scheme=scheme)
    if strips:
        steps = [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
        made.decoder = library.decoders.Sequence([*steps, library.decoders.Strip(" ", 1, 0)])
    specials = ["<unk>", "<s>", "</s>", "<image>"]
    trainer = library.trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    made.train_from_iterator(["a red star left of a blue circle"] * 3, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    tokenizer = load_tokenizer(str(tmp_path))
    pieces = ["a red", " star", "left "]
    one, two, three = map(tokenizer.encode, pieces)
    ours = [tokenizer.bos_id, *one, tokenizer.image_id, *two, tokenizer.image_id, *three, tokenizer.eos_id]
    assert made.encode("<s>a red<image> star<image>left </s>", add_special_tokens=False).ids == ours
    if scheme == "first":
        assert [tokenizer.decode(tokenizer.encode(piece)) for piece in pieces] == pieces


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"\x0a\x0e\x0a\x05<unk>", "line 1 .*SentencePiece"),
        ("tokenizer.model", b"YQ== 0\nYg==\n", "line 2 "),
        ("tokenizer.model", b"YQ== 0\nYg== 1\n", "all 256 single bytes"),
        ("tokenizer.json", b"{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"[]", "tokenizer.json does not hold an object"),
        ("tokenizer.json", b"{}", "type none"),
        ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "type Unigram; only BPE"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "tokenizer.json: "),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(str(tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="model.tokenizer_path = .*nowhere does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="holds no tokenizer.json or tokenizer.model"):
        load_tokenizer(str(tmp_path))


def test_no_torch_is_imported():
    load = (
        "from torchtitan.components import tokenizer as t; t.load_tokenizer('assets/tokenizer').encode('a')"
    )
    command = [sys.executable, "-c", f"import sys; {load}; print('torch' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, text=True, cwd=SHIPPED.parents[1]).stdout == "False\n"
