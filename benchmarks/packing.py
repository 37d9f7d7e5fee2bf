"""How full are slots, and what does planning them cost?

    python -m benchmarks.packing [--rows 200] [--seq_lens 512 2048 8192] [--buffers 256 1024]

Sizes of several kinds of data are drawn (merge 2, images of up to 1024 patches, and of up to an eighth of a
slot's tokens where slots are short: lumps of a third or half of a slot leave holes, however they are
planned), L is what the adviser says, about S times the patches per token, and the loader's own look-ahead and
packer fill slots with them:

    captions             one image, about 20 tokens of text (CC12M)
    documents            1 to 15 images, about 90 tokens of text around each; one in sixteen has no image
    text                 about 700 tokens, one in ten above 2,500
    few images           up to 2 images, about 700 tokens around each
    many images          5 to 24 images, about 30 tokens around each
    books                about 30,000 tokens
    conversations        one image, 2 to 8 turns of about 50 tokens
    books and captions   one book to 99 captions
    captions and text    four captions to one text
    everything           captions, conversations, pages with few and with many images, text: 5 : 2 : 1 : 1 : 1

Expected: at least 98 % on the side that binds, the fuller one, for all of them at S = 512, 2048 and 8192 and
a look-ahead of 256: whole documents fill both sides to about a sample's room, and text of a document too long
for a slot fills the rest to the token. Planning costs less than 5 % of the time that decoding the slot's
images takes on one core.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from benchmarks.photos import make_jpegs
from experiments.vlm.costs.packing_advice import Data, Deadline, Trials, search
from experiments.vlm.costs.packing_simulation import Prices, SizedDocument, Stream
from experiments.vlm.data.image import decode, probe
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.sources.mixture import Mixture

EXPECTED = 0.98
BEYOND = 64  # documents more than the look-ahead holds
PRICES = Prices(token=1.0, patch=0.34)  # of so400m with Llama 3.2 1B, in tokens
PLAN = ImagePlan()
Draw = Callable[[np.random.Generator], SizedDocument]


def image(random: np.random.Generator, longer_side: float = 420) -> tuple[int, int]:
    """(tokens, patches): the longer side about so many pixels, half of all images between 0.7 and 1.4 times
    that.
    """
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


def prose(random: np.random.Generator) -> SizedDocument:
    return [(1, 0), words(random, 700, 1.0), (1, 0)]


def book(random: np.random.Generator) -> SizedDocument:
    return [(1, 0), words(random, 30_000, 0.7), (1, 0)]


def few_images(random: np.random.Generator) -> SizedDocument:
    parts = [
        part for _ in range(random.integers(0, 3)) for part in (words(random, 700, 0.8), image(random, 600))
    ]
    return [(1, 0), *parts, words(random, 700, 0.8), (1, 0)]


def many_images(random: np.random.Generator) -> SizedDocument:
    parts = [
        part for _ in range(random.integers(5, 25)) for part in (words(random, 30, 0.7), image(random, 450))
    ]
    return [(1, 0), *parts, (1, 0)]


def conversation(random: np.random.Generator) -> SizedDocument:
    return [
        (1, 0),
        image(random, 500),
        *(words(random, 50, 0.8) for _ in range(random.integers(2, 9))),
        (1, 0),
    ]


KINDS: dict[str, list[tuple[Draw, float]]] = {  # sources and their weights
    "captions": [(caption, 1)],
    "documents": [(document, 1)],
    "text": [(prose, 1)],
    "few images": [(few_images, 1)],
    "many images": [(many_images, 1)],
    "books": [(book, 1)],
    "conversations": [(conversation, 1)],
    "books and captions": [(book, 1), (caption, 99)],
    "captions and text": [(caption, 4), (prose, 1)],
    "everything": [(caption, 5), (conversation, 2), (few_images, 1), (many_images, 1), (prose, 1)],
}


def draw(kind: str, tokens: int, count: int, largest: int, seed: int = 0) -> Stream:
    """At least so many documents and tokens in all; no image has more than `largest` patches."""
    random, sources, weights = np.random.default_rng(seed), [], [weight for _, weight in KINDS[kind]]
    mixture, documents = Mixture(weights, seed, slot=0), []
    while (tokens > 0 or len(documents) < count) and (source := mixture.pick()) is not None:
        mixture.give(source, 1)
        sources.append(source)
        documents.append([shrunk(part, largest) for part in KINDS[kind][source][0](random)])
        tokens -= sum(length for length, _ in documents[-1])
    return Stream(documents, sources, tuple(weights))


def shrunk(part: tuple[int, int], largest: int) -> tuple[int, int]:
    return (largest // PLAN.merge_size**2 + 2, largest) if part[1] > largest else part


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
        largest = min(PLAN.max_patches, seq_len // 2)
        stream = draw(kind, rows * seq_len, buffer + BEYOND, largest)
        trials = Trials(Data(stream, PRICES, PLAN.merge_size, largest), Deadline(math.inf))
        (seen,) = search(trials, [seq_len], [1], [buffer])
        yield {
            "data": kind,
            "seq_len": seq_len,
            "patches_per_row": seen.budget.patches_per_row,
            "buffer": buffer,
            "tokens": seen.tokens,
            "patches": seen.patches,
            "as_expected": max(seen.tokens, seen.patches) >= EXPECTED,
            "plan_ms": seen.plan_s * 1e3,
            "of_decoding": seen.plan_s / (seen.images * decoding) if seen.images else None,
            "longest_wait": seen.longest_wait,
            "rows": seen.rows,
        }


def line(result: dict) -> str:
    of_decoding = f"{result['of_decoding']:.1%}" if result["of_decoding"] is not None else "-"
    return (
        f"{result['data']:20} {result['seq_len']:5} {result['patches_per_row']:6} {result['buffer']:6} "
        f"{result['tokens']:7.2%} {result['patches']:7.2%} {'' if result['as_expected'] else 'below':5} "
        f"{result['plan_ms']:5.2f} ms {of_decoding:>11} {result['longest_wait']:5} {result['rows']:5}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200, help="slots that documents are drawn for, about")
    parser.add_argument("--seq_lens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--buffers", type=int, nargs="+", default=[256])
    args = parser.parse_args()
    print("data                     S      L buffer  tokens patches           plan of decoding  wait  rows")
    results = []
    for result in measure(args.rows, args.seq_lens, args.buffers):
        results.append(result)
        print(line(result), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
