"""How full are slots, and what does planning them cost?

    python -m benchmarks.packing [--rows 300] [--seq_lens 2048 4096 8192] [--buffers 256 1024]

Sizes of several kinds of data are drawn (images up to 1024 patches, merge 2), L is what scripts/advise_packing.py advises,
about S times the patches per token, and the loader's own window and packer fill slots with them:

    captions     one image, about 20 tokens of text (CC12M)
    documents    1 to 15 images, about 90 tokens of text around each, one document in sixteen without images
    mixture      six captions to three documents and one text of about 250 tokens
    long         documents with 800 tokens of text on average and up to 30 images, a tenth without any (OBELICS)

Expected of the first three, tokens and patches both: 96 % at S = 2048, 98 % at 4096, 99.5 % at 8192 at a look-ahead of 256, for
less than 5 % of the time that decoding the slot's images takes on one core. `long` has no target: beside a text of nearly S
tokens there is no room for images, whoever plans. The column "lost" is the share of all patches that such texts cost by themselves.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from benchmarks.photos import make_jpegs
from experiments.vlm.data.advice import SizedDocument, advise, pieces_of
from experiments.vlm.data.image import ImagePlan, decode, probe
from experiments.vlm.data.packing import Budget

TARGETS = {2048: 0.96, 4096: 0.98, 8192: 0.995}
PLAN = ImagePlan()
Draw = Callable[[np.random.Generator], SizedDocument]


def image(random: np.random.Generator, longer_side: float = 420) -> tuple[int, int]:
    """(tokens, patches): the longer side about so many pixels, half of all images between 0.7 and 1.4 times that."""
    longer, aspect = random.lognormal(math.log(longer_side), 0.5), random.lognormal(0, 0.35)
    h, w = PLAN.grid(max(1, int(longer * math.sqrt(aspect))), max(1, int(longer / math.sqrt(aspect))))
    return h * w // PLAN.merge_size**2 + 2, h * w


def words(random: np.random.Generator, median: float, spread: float) -> tuple[int, int]:
    return int(random.lognormal(math.log(median), spread)) + 1, 0


def caption(random: np.random.Generator) -> SizedDocument:
    return [(1, 0), image(random), words(random, 20, 0.6), (1, 0)]


def text(random: np.random.Generator) -> SizedDocument:
    return [(1, 0), words(random, 250, 0.8), (1, 0)]


def document(random: np.random.Generator) -> SizedDocument:
    if random.random() < 1 / 16:
        return text(random)
    parts = []
    for _ in range(min(15, int(random.geometric(0.35)))):
        parts += [words(random, 90, 0.7), image(random)] if random.random() < 0.8 else [image(random)]
    return [(1, 0), *parts, words(random, 90, 0.7), (1, 0)]


def long_document(random: np.random.Generator) -> SizedDocument:
    images = min(30, int(random.geometric(0.4))) if random.random() < 0.9 else 0
    cuts = np.sort(random.random(images))
    shares = np.diff(np.concatenate([[0.0], cuts, [1.0]]))
    length = random.lognormal(math.log(600), 0.8)
    parts = [part for share in shares[:-1] for part in ((int(length * share) + 1, 0), image(random, 600))]
    return [(1, 0), *parts, (int(length * shares[-1]) + 1, 0), (1, 0)]


def mixture(random: np.random.Generator) -> SizedDocument:
    return random.choice([caption, document, text], p=[0.6, 0.3, 0.1])(random)


KINDS: dict[str, Draw] = {"captions": caption, "documents": document, "mixture": mixture, "long": long_document}


def draw(kind: str, tokens: int, seed: int = 0) -> list[SizedDocument]:
    """Documents of so many tokens in all."""
    random, documents = np.random.default_rng(seed), []
    while tokens > 0:
        documents.append(KINDS[kind](random))
        tokens -= sum(part for part, _ in documents[-1])
    return documents


def lost_to_texts(documents: list[SizedDocument], budget: Budget) -> float:
    """Share of the patches that pieces with few images leave no tokens for, were the rest of their slot nothing but images."""
    pieces = [piece for document in documents for piece in pieces_of(document, budget, PLAN.merge_size)]
    rows = sum(piece.length for piece in pieces) / budget.seq_len
    room = [PLAN.merge_size**2 * (budget.seq_len - piece.length) for piece in pieces]
    return sum(max(0, budget.patches - piece.patches - free) for piece, free in zip(pieces, room, strict=True)) / budget.patches / rows


def decode_seconds(count: int = 24) -> float:
    """One core, an image of 400 to 1600 pixels to at most 1024 patches."""
    jpegs = make_jpegs(count)
    started = time.process_time()
    for data in jpegs:
        h, w = PLAN.grid(*probe(data))
        decode(data, h * PLAN.patch_size, w * PLAN.patch_size)
    return (time.process_time() - started) / count


def measure(rows: int, seq_lens: list[int], buffers: list[int]) -> Iterator[dict]:
    decoding = decode_seconds()
    for kind, seq_len, buffer in product(KINDS, seq_lens, buffers):
        documents = draw(kind, max(seq_lens) * rows)
        seen = advise(documents, seq_len, 1, buffer, PLAN.merge_size, PLAN.max_patches)
        yield {
            "data": kind,
            "seq_len": seq_len,
            "patches_per_row": seen.budget.patches_per_row,
            "buffer": buffer,
            "expected": TARGETS.get(seq_len) if kind != "long" else None,
            "tokens": seen.tokens,
            "patches": seen.patches,
            "lost": lost_to_texts(documents, seen.budget),
            "plan_ms": seen.plan_s * 1e3,
            "of_decoding": seen.plan_s / (seen.images * decoding),
            "longest_wait": seen.longest_wait,
            "rows": seen.rows,
        }


def line(result: dict) -> str:
    expected = f"{result['expected']:.1%}" if result["expected"] else "-"
    return (
        f"{result['data']:10} {result['seq_len']:5} {result['patches_per_row']:6} {result['buffer']:6} {expected:>8} "
        f"{result['tokens']:7.2%} {result['patches']:7.2%} {result['lost']:6.1%} "
        f"{result['plan_ms']:5.2f} ms {result['of_decoding']:11.1%} {result['longest_wait']:5}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="slots of the largest S that are filled, and more of the others")
    parser.add_argument("--seq_lens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--buffers", type=int, nargs="+", default=[256])
    args = parser.parse_args()
    print("data           S      L buffer expected  tokens patches   lost     plan of decoding  wait")
    results = []
    for result in measure(args.rows, args.seq_lens, args.buffers):
        results.append(result)
        print(line(result), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
