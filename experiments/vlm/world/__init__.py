"""The embedded world: small pictures that say something, drawn on first use, and true words about them.

    scene -> sprites, render -> a picture        scene (what is where) makes a picture and its words
    scene -> caption, document -> words
    digits -> strips       pictures of handwritten digits, which nobody here drew, and what is asked of them
    shards: pictures and words -> tar and parquet files        cache: the folder of a split, drawn if absent

`ensure("sees/train")` gives the folder. Worlds: captions, interleaved, llava_captions,
llava_questions, questions, reads, sees; of each train and heldout.
"""

from experiments.vlm.world.cache import ensure

__all__ = ["ensure"]
