"""Rows of the token embedding: as published with the flavor, or more where the tokenizer has more ids."""

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.chat_template import ends_of, load_chat_template
from experiments.vlm.model_config import model_config
from experiments.vlm.processor import template_of
from torchtitan.components.tokenizer import Tokenizer, load_tokenizer
from torchtitan.config.shipped import shipped
from torchtitan.tools.logging import warn_once

# Share of the published rows below which a tokenizer is hardly the model's own; own ones fill 0.99 and more.
FEW = 0.9


def rows_of(job: VLMJobConfig, tokenizer: Tokenizer | None) -> int:
    """Published embeddings have rows beyond the tokenizer's ids (Qwen); one with more ids enlarges them."""
    return max(model_config(job).decoder.vocab_size, tokenizer.vocab_size if tokenizer else 0)


def planned_rows(job: VLMJobConfig) -> int:
    """For estimates; where the tokenizer is not here, as published, with a warning."""
    if shipped(job.model.tokenizer_path).exists():
        return rows_of(job, open_tokenizer(job))
    rows = rows_of(job, None)
    warn_once(f"model.tokenizer_path = {job.model.tokenizer_path} is not here: {rows} rows as published")
    return rows


def rows_before_image(job: VLMJobConfig) -> int | None:
    """Rows of a table before that of an image, where none behind it is read for anything else; else None."""
    tokenizer, template = load_tokenizer(job.model.tokenizer_path), load_chat_template(template_of(job))
    read = [tokenizer.backend.rows - 1, tokenizer.bos_id or 0, *ends_of(tokenizer, template)]
    return tokenizer.image_id if max(read) < tokenizer.image_id else None


def open_tokenizer(job: VLMJobConfig) -> Tokenizer:
    """The job's tokenizer; with a warning where it is hardly the flavor's own."""
    tokenizer = load_tokenizer(job.model.tokenizer_path)
    ids, published = tokenizer.vocab_size, model_config(job).decoder.vocab_size
    flavor = f"{job.model.label} {published:,} rows"
    sizes = f"model.tokenizer_path = {job.model.tokenizer_path} has {ids:,} ids, {flavor}"
    if ids > published:
        warn_once(
            f"{sizes}: the embedding is enlarged by {ids - published:,} rows, which no published weights fill"
        )
    elif ids < FEW * published:
        warn_once(
            f"{sizes}: {published - ids:,} of them stand for nothing; is this the model's own tokenizer?"
        )
    return tokenizer
