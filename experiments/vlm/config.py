"""The sections that the vision-language experiment adds to a job: [data], its sources,
[validation.sources], and how ranks share the encoder in [parallelism]."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from torchtitan.config.errors import ConfigError
from torchtitan.config.job import ActivationCheckpoint, Checkpoint, JobConfig, Parallelism, Validation
from torchtitan.config.recomputation import Recomputation

FIRST = "data.sources.0."
PARTS = ("encoder", "projector", "decoder")  # of the model


@dataclass
class Columns:
    """The fields of a record by the data set's own names; empty: the usual ones of the format."""

    image: str = ""  # field of the image or images; in a tar the ending of its files, such as jpg
    text: str = ""  # field of the text, or of the turns of a conversation


@dataclass
class Source:
    """Where data lie, what they are, and how they are read."""

    name: str = ""  # how reports and metrics call it; empty: the format's name
    format: str = ""  # how samples lie in the files (--help data lists all)
    path: str = ""  # a file, glob, brace range or folder, local or remote (fsspec), or embedded:WORLD/SPLIT
    # {image = "...", text = "..."}: what the fields are called, where not as the format has it
    columns: Columns = field(default_factory=Columns)
    weight: float = 1.0  # share of the mixture, over the sum of all weights
    shuffle: bool = True  # shards in another order each epoch, and samples in windows of shuffle_buffer
    shuffle_buffer: int = 1024  # samples of a shard that are permuted among each other
    repeat: bool = True  # begin anew where it ends; off: the other sources go on without it
    # conversations: chatml, llama3, vicuna_v1, plain (answers alone), or a file: Jinja, tokenizer_config.json
    chat_template: str = "chatml"


@dataclass
class Data:
    """How batches are made of the sources."""

    sources: list[Source] = field(default_factory=list)  # the mixture, [[data.sources]]
    weight_by: Literal["samples", "tokens"] = "samples"  # what a source's weight is a share of
    epochs: int = 0  # end after every sample was delivered this many times; 0: training.steps alone decides
    # L, patches of a row; best at seq_len times the patches that the mixture has for each token, as
    # scripts/advise_packing.py finds
    patches_per_row: int = 1024
    patch_rows: int = 1  # rows of L patches that hold the images of a slot
    max_patches_per_image: int = 1024  # no image, or no tile of one, gets more patches than this
    min_patches_per_image: int = 4  # smaller images are enlarged to about this many
    # the largest image in pixels, in place of max_patches_per_image
    max_pixels_per_image: int | None = None
    # the smallest in pixels, in place of min_patches_per_image
    min_pixels_per_image: int | None = None
    # the largest in visual tokens, in place of max_patches_per_image
    max_tokens_per_image: int | None = None
    # the smallest in visual tokens, in place of min_patches_per_image
    min_tokens_per_image: int | None = None
    patch_size: int | None = None  # side of a patch in pixels; unset: as the model takes them
    # m: m * m patches become one visual token; unset: as the model merges them (2 where its projector is new)
    spatial_merge_size: int | None = None
    # native: keep the aspect ratio; square: squeeze, as fixed-size encoders do; padded: a square with borders
    # of the encoder's mean colour; cropped: the middle square; tiles: squeezed, and also cut into several
    # squares; unset: as the model takes them. A square is of the encoder's own size, or of
    # max_patches_per_image where that is less
    resize: str | None = None
    max_tiles_per_image: int | None = None  # besides the view of all of it; unset: as the model takes them
    packing_buffer_size: int = 256  # samples read ahead for each slot, of which those that fit are taken
    # a document longer than a slot is cut into pieces, cut short, or left out
    long_documents: Literal["split", "truncate", "drop"] = "split"
    # processes of each rank that reads, which read and decode for it; 0: the trainer does it itself
    num_workers: int = 0
    decode_threads: int = 1  # threads of each of them that decode and resize images
    # batches that they have ready beyond the present step; none with num_workers = 0
    prefetch: int = 2
    # stop when more than this share of a source's samples is bad, of 1,000 at least; 1.0: never
    max_bad_fraction: float = 1.0
    cache_folder: str = ""  # embedded data and copies of shards and images; empty: ~/.cache/torchtitan-vlm
    # most GB of copies of shards, row groups and images in cache_folder, of all runs that share it; the
    # longest unused go first
    cache_gb: float = 50.0
    # how long shards are tried again while their storage is away; then the run stops, saved where it was
    storage_timeout_s: float = 600.0
    allow_private_urls: bool = False  # fetch images from private, loopback and link-local addresses too
    # how long an image given by its address may take; a new value asks again for those that failed
    url_timeout_s: float = 5.0
    # shards that came since the run began join it with the next epoch; else they stop the next start
    join_new_shards: bool = False
    new_shards_freq: int = 1000  # steps between looks for shards that may join; 0: at starts alone
    # resume although the data or their configuration changed; their order starts anew
    resume_changed_data: bool = False

    def image_limit(self, which: Literal["min", "max"]) -> tuple[str, int, str]:
        """The least or the most of an image: the option that says it, how many, and of what."""
        for unit in ("pixels", "tokens", "patches"):
            name = f"{which}_{unit}_per_image"
            if (value := getattr(self, name)) is not None:
                return f"data.{name}", value, unit
        raise AssertionError("patches have a default")


@dataclass
class VLMParallelism(Parallelism):
    """How the work is split over ranks, the encoder's too."""

    # ranks that hold the same slots encode a share of the images each; off: all of them each; auto: a share
    # where it comes out even
    encoder_sharing: Literal["auto", "on", "off"] = "auto"
    encoder_tensor_parallel: bool = False  # tensor parallel ranks share the encoder's heads, not its images
    pipeline_parallel_encoder_stage: bool = False  # the encoder is a stage of its own


@dataclass
class VLMActivationCheckpoint(ActivationCheckpoint):
    """Which activations of each tower are recomputed in backward instead of kept."""

    encoder_mode: Literal["none", "selective", "full"] = "none"  # as mode, in the encoder
    encoder_full_layers: int = 0  # as full_layers, in the encoder
    encoder_selective_layers: int = 0  # as selective_layers, in the encoder

    @property
    def encoder(self) -> Recomputation:
        """Recomputation in the encoder's layers."""
        layers = self.encoder_full_layers, self.encoder_selective_layers
        return Recomputation(self.encoder_mode, self.selective_ac_option, *layers)


@dataclass
class VLMCheckpoint(Checkpoint):
    """Checkpoints, and folders of others for parts of the model."""

    # the encoder starts from this Hugging Face folder; the projector is new where initial_load_path has none
    initial_load_encoder_path: str = ""
    initial_load_decoder_path: str = ""  # the decoder starts from this Hugging Face folder


@dataclass
class VLMValidation(Validation):
    """Evaluation on held-out data while training."""

    sources: list[Source] = field(default_factory=list)  # held-out data, [[validation.sources]]
    # after the last step evaluate with images blanked, and with those of other samples, too
    controls: bool = False
    # tasks as NAME=FILE (evaluate --list has the names), answered and scored every task_freq steps; not with
    # a pipeline
    tasks: list[str] = field(default_factory=list)
    # records of a task's file that are asked, the first ones, kept in host memory; -1: all
    task_records: int = 200
    task_sequences: int = 8  # answers that a rank writes at a time, each with a cache of a slot and an answer
    task_pictures: int = 4  # records of each task that TensorBoard and wandb show with what the model said


@dataclass
class VLMJobConfig(JobConfig):
    """A job with data and held-out data of images and text."""

    parallelism: VLMParallelism = field(default_factory=VLMParallelism)
    activation_checkpoint: VLMActivationCheckpoint = field(default_factory=VLMActivationCheckpoint)
    checkpoint: VLMCheckpoint = field(default_factory=VLMCheckpoint)
    data: Data = field(default_factory=Data)
    validation: VLMValidation = field(default_factory=VLMValidation)

    def use_single_source(self, given: Collection[str]) -> None:
        """Keep of [[data.sources]] how it is read alone, in one source. `given`: options of the command line.

        Raises ConfigError where that is not one thing, or where an option is about a source that is gone.
        """
        for option in sorted(given):
            if option.startswith("data.sources.") and not option.startswith(FIRST):
                raise ConfigError(f"--{option}: training.dataset leaves one source, {FIRST.rstrip('.')}")
            if option in (FIRST + "format", FIRST + "path"):
                raise ConfigError(f"--{option}: training.dataset and its path say it; keep one of them")
        if self.data.sources:
            self.data.sources = [without_place(self.data.sources, given)]

    def training_sources(self) -> list[Source]:
        """What to train on: [[data.sources]], or what training.dataset and its path name."""
        format, path, listed = self.training.dataset, self.training.dataset_path, self.data.sources
        if not (format or path):
            return listed
        return [replace(listed[0] if listed else Source(), format=format, path=path)]


def without_place(listed: list[Source], given: Collection[str]) -> Source:
    """What the sources agree in, in one without format and path.

    Raises ConfigError where they do not agree.
    """
    one = Source(weight=listed[0].weight)
    if FIRST + "name" in given:
        one.name = listed[0].name
    if any(option.startswith(FIRST + "columns.") for option in given):  # else those of the place that is left
        one.columns = listed[0].columns
    for field_name in ("shuffle", "shuffle_buffer", "repeat", "chat_template"):
        values = list(dict.fromkeys(getattr(source, field_name) for source in listed))
        if len(values) > 1 and FIRST + field_name not in given:
            raise ConfigError(
                f"training.dataset takes the place of {len(listed)} sources that differ in {field_name} "
                f"({', '.join(map(str, values))}): say which holds with --{FIRST}{field_name}"
                + (f" or --{FIRST}no_{field_name}" if isinstance(values[0], bool) else "")
            )
        setattr(one, field_name, values[0])
    return one
