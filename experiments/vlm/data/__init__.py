"""From shards to batches in two passes: a row is planned on integers alone, then filled with pixels.

PLAN: what the next row of a slot holds, a SlotPlan (`Slot.plan`)
    sources/     which records of which shard a slot reads when (order, mixture), one after the other (reader)
    formats/     record -> document: texts and references to images (document)
    chat_template  turns -> texts, with markers and loss (built_in_templates, or a file: jinja_template)
    image_plan   size of an image -> its views in patches, and its tokens (image_layout); tiles: of several
    setup        from a job to what all slots have in common
    sample       document -> token ids, targets, sizes of images in patches
    split        where a document that is longer than a slot may be cut
    lookahead    what waits; which documents or pieces share the next row
    packing      the search for those, on integers
    good_sample  a source that gives a slot nothing is an error: its records tried as a slot would
    slot         all of that for one slot, and the state to resume it from
FILL: a SlotPlan becomes one slot's part of a batch (`Collator.start`)
    collate      decode -> patches -> row: pixels, tokens, labels, indices, padding
    batch_metrics  what a batch counts of itself: a new metric is a row there
RUN: who plans and fills; the steps are the same whichever process does (`next(Loader)`)
    producer     the slots of one process
    workers      processes, each with a producer, that write into shared_memory
    prefetch     steps with or without workers, as nodes of torchdata, which pin them for a GPU
    ranks        what the ranks of a job know together: the list of shards
    resume       how a run goes on with what its slots had read (slot_state), and shards that are new
    loader       the steps of a rank as the trainer takes them

Alongside: image (sizes for PLAN, decoding for FILL; jpeg_header: sizes of the usual ones, faster;
rgb: what Pillow loads as RGB; decoding_memory: for large ones), rejects, reject_log and report (what is not
used, and why), controls (validation with spoilt images), storage/ (outages, copies, addresses). RUN imports
FILL, and FILL imports PLAN, never the reverse.
What comes out, with an example: experiments/vlm/batch.py.
"""
