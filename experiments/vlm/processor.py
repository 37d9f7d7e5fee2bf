"""What turns images and conversations into a model's inputs, as the files that stock transformers opens.

    write_language(job, folder)    tokenizer, chat template and generation config: for the decoder alone
    write_processor(job, folder)   these and the processor's own (model/families), for the whole model

AutoProcessor then gives the token ids and grids that the job trained on, and the same pixels where an image
needs no resize; else they agree to 50 dB. Imports no torch.
"""

import json
from pathlib import Path
from typing import Any

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.chat_template import ChatTemplate, ends_of, load_chat_template
from experiments.vlm.model.families import family_of
from experiments.vlm.model.families.family import Family, read_image_processor
from experiments.vlm.model_config import model_config, plan_of
from torchtitan.components.tokenizer import Tokenizer, load_tokenizer, read_json
from torchtitan.components.tokenizer_files import write_tokenizer
from torchtitan.config.errors import require
from torchtitan.tools.disk import write_json
from torchtitan.tools.logging import warn_once

GENERATION = "generation_config.json"
SPOKEN = ("llava", "messages", "finevision", "the_cauldron")  # formats that hold conversations alone
# before a template that only says where images stand
UNSPOKEN = "{# This model was trained without conversations. #}"
# For a template that shows no images: turns each content into the form that it takes, images in their places.
FLATTEN = """{% set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set said = namespace(text='') -%}
{%- if message.content is string -%}{%- set said.text = message.content -%}{%- else -%}
{%- for item in message.content -%}
{%- set said.text = said.text + (image_token if item.type == 'image' else item.text) -%}
{%- endfor -%}{%- endif -%}
{%- set flat.messages = flat.messages + [dict(message, content=CONTENT)] -%}
{%- endfor -%}
{%- set messages = flat.messages %}
"""


def write_language(job: VLMJobConfig, folder: Path) -> None:
    """Write tokenizer, chat template and generation config. Raises ConfigError where one cannot be read."""
    tokenizer, template = load_tokenizer(job.model.tokenizer_path), load_chat_template(template_of(job))
    named = {
        "image_token": tokenizer.image_id,
        "image_start_token": tokenizer.begin_image_id,
        "image_end_token": tokenizer.end_image_id,
    }
    write_tokenizer(job.model.tokenizer_path, folder, named)
    source = template_source(template, tokenizer)
    source = source if spoken_template(job) else UNSPOKEN + source
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    write_json(folder / GENERATION, generation_config(template, tokenizer))


def write_processor(job: VLMJobConfig, folder: Path, family: Family | None = None) -> None:
    """Write those and the processor's own config. Raises ConfigError as `write_language` does, and where no
    processor makes images as the job does. `family`: see processor_config.
    """
    config = processor_config(job, family)
    write_language(job, folder)
    if config:
        write_json(folder / "processor_config.json", config)


def processor_config(job: VLMJobConfig, family: Family | None = None) -> dict[str, Any]:
    """The config of a processor that makes images as the job does; empty: its folder needs none. `family`:
    the one that the model is written as; None: its own. Raises ConfigError where there is none, and where
    that family's class does not compute what the model does.
    """
    model = model_config(job)
    family = family or family_of(model)
    family.require(model)
    return family.processor(model, plan_of(model, job))


def read_image_limits(folder: Path, job: VLMJobConfig) -> None:
    """Give the job the least and the most patches of an image as a folder's processor has them, if it says; a
    row of patches holds the largest. Raises ConfigError for a file that is no processor's.
    """
    file = read_image_processor(folder)
    if file is None:
        return
    names = ("min_image_tokens", "max_image_tokens", "downsample_factor")
    limits: list[Any] = [file.values.get(name) for name in names]
    least, most, merge = limits
    if all(isinstance(value, int | float) and value > 0 for value in (least, most, merge)):
        smallest, largest = round(least * merge**2), round(most * merge**2)
        job.data.min_patches_per_image, job.data.max_patches_per_image = smallest, largest
        job.data.min_pixels_per_image = job.data.max_pixels_per_image = None
        job.data.min_tokens_per_image = job.data.max_tokens_per_image = None
        job.data.patches_per_row = max(job.data.patches_per_row, largest)


def generation_config(template: ChatTemplate, tokenizer: Tokenizer) -> dict[str, Any]:
    """Where generation begins, and what it ends with."""
    bos = {} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}
    return bos | {"eos_token_id": ends_of(tokenizer, template), "pad_token_id": tokenizer.pad_id}


def folder_ends(folder: Path) -> frozenset[int]:
    """Ids that end an answer, by a folder's generation config; none without one. Raises ConfigError."""
    path = folder / GENERATION
    ends = read_json(path, {}).get("eos_token_id")
    listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
    require(all(type(id) is int for id in listed), f"{path}: eos_token_id = {ends!r}: expected ids")
    return frozenset(listed)


def template_of(job: VLMJobConfig) -> str:
    """The chat template of the job's conversations; where its sources differ, that of the first."""
    sources = job.training_sources()
    spoken = [source.chat_template for source in sources if source.format in SPOKEN]
    names = list(dict.fromkeys(spoken or [source.chat_template for source in sources] or ["chatml"]))
    if len(names) > 1:
        warn_once(f"sources differ in chat_template ({', '.join(names)}): {names[0]} is written")
    return names[0]


def spoken_template(job: VLMJobConfig) -> str:
    """The chat template of the first source of conversations; empty: the job trains none, and its model
    answers by continuing a document.
    """
    spoken = (source.chat_template for source in job.training_sources() if source.format in SPOKEN)
    return next(spoken, "")


def folder_template(folder: Path) -> str:
    """What load_chat_template takes of a Hugging Face folder; empty: its model knows no conversations.

    Raises ConfigError where the folder does not say.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return "" if file.read_bytes().startswith(UNSPOKEN.encode()) else str(file)
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return ""
    require(
        "chat_template" in read_json(file, {}),
        f"{folder}: has no chat template; say with --chat_template how its model is asked (none: it goes on "
        "from what it is given)",
    )
    return str(file)


def template_source(template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """The template, so that transformers renders what we train on.

    An image is one image token, which its processor replaces by begin, visual tokens and end. Special tokens
    are those that the template's own files name.
    """
    source, named = template.file.source, template.file.variables
    image, bos_id = tokenizer.spellings[tokenizer.image_id], tokenizer.bos_id
    bos = "" if bos_id is None else tokenizer.spellings[bos_id]
    written = {"bos_token": bos, "eos_token": tokenizer.spellings[tokenizer.eos_id]}
    own = {role: named.get(role, "") for role, text in written.items() if named.get(role, "") != text}
    variables = {"image_token": image} | (own if named else {})
    if not template.markup:
        content = "said.text" if template.takes_text else "[{'type': 'text', 'text': said.text}]"
        source = FLATTEN.replace("CONTENT", content) + source
    elif named and template.markup != image:
        replacing = f"replace({json.dumps(template.markup)}, image_token)"
        # Jinja drops one newline at the end of a file, and one behind a block.
        source = f"{{% filter {replacing} %}}\n{source.removesuffix(chr(10))}{{% endfilter %}}"
    known = (f"{{% set {name} = {json.dumps(text)} %}}\n" for name, text in variables.items())
    return "".join(known) + source
