"""Train the small tokenizer that ships with the repository, and write it as a tiktoken file.

    python scripts/train_tokenizer.py --out assets/tokenizer

Its text is the embedded world's (captions and documents of the training split, no pictures drawn) and the
English of assets/tokenizer/english.txt. 1024 ids in all: 256 bytes, 704 merges and 64 special tokens.
"""

import argparse
import base64
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from experiments.vlm.world.caption import describe, varied_caption  # noqa: E402
from experiments.vlm.world.document import draw_document  # noqa: E402
from experiments.vlm.world.scene import sees_scene, varied_scene  # noqa: E402
from torchtitan.components.tokenizer import LLAMA3_SPLIT  # noqa: E402
from torchtitan.components.tokenizer_files import byte_spellings  # noqa: E402

IDS = 1024
NAMED = [
    *(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        "<|image|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
    ),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"),
]
SPECIALS = NAMED + [f"<|reserved_special_token_{i}|>" for i in range(64 - len(NAMED))]


def world_text() -> Iterator[str]:
    rng = random.Random("tokenizer")
    for _ in range(3000):
        yield describe(sees_scene(rng, heldout=False))
        yield varied_caption(varied_scene(rng, False, longest=512), rng)
    for _ in range(1000):
        yield from (part for part in draw_document(rng, heldout=False) if isinstance(part, str))


def corpus() -> Iterator[str]:
    for text in world_text():
        # What is written in a picture has to be read glyph by glyph: no token may hold two of them.
        yield re.sub(r"[A-Z0-9]{2,}", lambda glyphs: "\n".join(glyphs[0]), text)
    english = (REPOSITORY / "assets/tokenizer/english.txt").read_text(encoding="utf-8")
    yield from [english] * 10  # so that common words come before the world's rare ones


def train() -> list[bytes]:
    """Tokens in the order of their ranks."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=IDS - len(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    byte_of = {character: byte for byte, character in byte_spellings().items()}
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [bytes(byte_of[character] for character in token) for token, _ in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for tokenizer.model and special_tokens.json"
    )
    out = parser.parse_args().out
    tokens = train()
    out.mkdir(parents=True, exist_ok=True)
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (out / "tokenizer.model").write_bytes(b"".join(lines))
    (out / "special_tokens.json").write_text(json.dumps(SPECIALS, indent=0) + "\n", encoding="utf-8")
    print(
        f"{len(tokens)} tokens and {len(SPECIALS)} special ones written to {out}; try it: "
        f"--model.tokenizer_path {out}"
    )


if __name__ == "__main__":
    main()
