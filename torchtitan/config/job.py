"""Every option of a training job, one dataclass per TOML section.

The comment after or above a field is its `--help` text, and its default lives here alone. Names follow
torchtitan's TOML files. An experiment adds sections of its own by subclassing `JobConfig` (see
experiments/vlm/config.py). Imports no torch, so that a typo is reported at once.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config.recomputation import Recomputation


@dataclass
class Job:
    """The run as a whole: what it reads, where it writes."""

    config_file: str | None = None  # TOML file to read; the last one given wins
    dump_folder: str = "./outputs"  # everything a run writes goes below this folder
    description: str = ""  # a note for people, printed at the start, and the notes of a run in wandb
    print_config: bool = False  # print the resolved configuration before the run starts
    # check everything, build the model without its weights, read one batch, print sizes and memory, train
    # nothing
    dry_run: bool = False


@dataclass
class Profiling:
    """Traces and memory snapshots for performance work; both cost time in the steps they record."""

    enable_profiling: bool = False  # write torch profiler traces
    save_traces_folder: str = "profile_traces"  # folder of the traces, below dump_folder
    profile_freq: int = 10  # steps between two traces
    enable_memory_snapshot: bool = False  # write CUDA memory snapshots every profile_freq steps
    save_memory_snapshot_folder: str = "memory_snapshot"  # folder of the snapshots, below dump_folder


@dataclass
class Metrics:
    """What is printed and kept of each step."""

    log_freq: int = 10  # steps between two printed lines
    enable_tensorboard: bool = False  # write TensorBoard event files
    save_tb_folder: str = "tb"  # folder of the event files, below dump_folder
    enable_wandb: bool = False  # log to Weights & Biases (WANDB_MODE=offline works)
    wandb_name: str = ""  # name of the run in wandb; empty: WANDB_NAME, or the last part of job.dump_folder
    # runs that wandb shows together, as those of a sweep; empty: WANDB_RUN_GROUP
    wandb_group: str = ""
    disable_color_printing: bool = False  # plain console lines; always plain when no terminal is attached
    save_plot: bool = True  # draw curves.png into dump_folder when the run ends


@dataclass
class Model:
    """Which model is trained, and with which tokenizer."""

    name: str = "vlm"  # which kind of model, a folder of experiments/
    # which sizes (--help model lists all); empty: as the weights that the run starts from say, else
    # debugmodel
    flavor: str = ""
    # a tokenizer.model (tiktoken) or tokenizer.json, or the folder that holds one
    tokenizer_path: str = "assets/tokenizer"
    # what computes attention; auto: flex on GPU, sdpa on CPU
    attention_backend: Literal["auto", "flex", "sdpa"] = "auto"

    @property
    def label(self) -> str:
        """What to call the model in a message."""
        return f"model.flavor = {self.flavor}" if self.flavor else "the model"


@dataclass
class ParameterGroup:
    """Parameters with options of their own, [[optimizer.groups]]; what is not set is that of [optimizer]."""

    # a part, or a regular expression that is looked for in the names of parameters; the first group that
    # matches a parameter has it
    pattern: str = ""
    name: str = ""  # how metrics call it; empty: the pattern
    lr: float | None = None  # peak learning rate of AdamW
    muon_lr: float | None = None  # peak learning rate of Muon
    weight_decay: float | None = None  # as optimizer.weight_decay
    schedule_factor: float = 1.0  # learning rates of this group are this many times as high, all along
    # the learning rate of a layer is this share of that of the next; 1: all layers have the same
    layer_decay: float = 1.0


@dataclass
class Optimizer:
    """How weights follow from gradients."""

    name: Literal["AdamW", "Muon"] = "AdamW"  # Muon: matrices by Muon at muon_lr, the rest by AdamW at lr
    lr: float = 8e-4  # peak learning rate of AdamW
    muon_lr: float = 0.02  # peak learning rate of Muon, scaled by sqrt(max(1, out / in)) per matrix
    muon_momentum: float = 0.95  # Nesterov momentum of Muon
    beta1: float = 0.9  # AdamW: how much of its mean of gradients is kept each step
    beta2: float = 0.95  # AdamW: how much of its mean of squared gradients is kept each step
    eps: float = 1e-8  # AdamW: added to the root of that mean before it divides
    weight_decay: float = 0.1  # a step shrinks weights by this times the learning rate; not norms and biases
    # AdamW kernels; auto: fused where available
    implementation: Literal["auto", "fused", "foreach", "for-loop"] = "auto"
    groups: list[ParameterGroup] = field(default_factory=list)  # parameters with options of their own


@dataclass
class LRScheduler:
    """How the learning rate goes over the run: warm-up, a plateau, decay."""

    # optimizer steps of linear warm-up; cut, with a warning, where training.steps is less
    warmup_steps: int = 200
    # share of the steps spent in decay, after warm-up; unset: all that are left
    decay_ratio: float | None = None
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"  # shape of the decay
    min_lr_factor: float = 0.0  # the learning rate ends at this share of its peak


@dataclass
class Training:
    """Data, sizes of a step, precision and what is frozen."""

    # format of a single source (cc12m, text, ...); on the command line it replaces those of data.sources
    dataset: str = ""
    dataset_path: str = ""  # its files: a file, glob, brace range or folder
    local_batch_size: int = 8  # B, slots (rows of packed documents) that each rank takes per forward
    global_batch_size: int = -1  # G, slots per optimizer step, in several forwards; -1: one forward
    seq_len: int = 2048  # S, tokens of a slot, those of images included
    max_norm: float = 1.0  # gradients are clipped to this global norm; 0: not clipped
    steps: int = 10000  # optimizer steps
    # dtype of parameters in forward and backward
    mixed_precision_param: Literal["float32", "bfloat16"] = "bfloat16"
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"  # dtype of gradient reductions
    enable_cpu_offload: bool = False  # keep parameters, gradients and optimizer state in host memory
    loss_chunk_tokens: int = 4096  # tokens whose logits exist at one time: fewer take less memory
    gc_freq: int = 50  # steps between two collections of Python's garbage; none in between
    # what does not train: parts (encoder, projector, decoder), or regular expressions that are looked for in
    # the names of parameters (decoder\.layers\.[01]\., norm)
    freeze: list[str] = field(default_factory=list)
    # special tokens (<|im_end|>; new: all that the tokenizer's file lacks) whose rows of the embedding and
    # output tables train although training.freeze has the tables
    trainable_tokens: list[str] = field(default_factory=list)


@dataclass
class LoRA:
    """Low-rank adapters of frozen linear maps."""

    rank: int = 0  # rank of each adapter; 0: no adapters
    alpha: float = 16.0  # an update is multiplied by alpha / rank
    dropout: float = 0.0  # share of an adapter's input that is dropped in training
    # the linear maps that get one: parts, or regular expressions that are looked for in the names of modules
    # (decoder, attention\.w[qv]$); all else of these parts is frozen
    patterns: list[str] = field(default_factory=lambda: ["decoder"])
    initial_load_path: str = ""  # start from this folder that peft or an export wrote, not from new adapters


@dataclass
class Float8:
    """Linear maps that compute in fp8 numbers, by torchao; weights stay what they are."""

    enable: bool = False  # needs the extra fp8, and a GPU of compute capability 8.9 or more
    # rowwise: all three products of a map in fp8, each row of a factor with a scale of its own;
    # rowwise_with_gw_hp: the gradient of the weight in training.mixed_precision_param
    recipe_name: Literal["rowwise", "rowwise_with_gw_hp"] = "rowwise"
    # the linear maps: parts, or regular expressions that are looked for in the names of modules (decoder,
    # encoder\.layers.*fc[12]$); those whose sizes are no multiples of 16 are named in the log and left out
    patterns: list[str] = field(default_factory=lambda: ["decoder"])
    # of these, maps with one of these texts in their names do not; the output layer cannot
    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    emulate: bool = False  # fp8 numbers but float32 products: slow, on any device, for tests and comparisons


@dataclass
class Parallelism:
    """How the model and its data are split over the ranks."""

    data_parallel_replicate_degree: int = 1  # copies of the sharded model (HSDP)
    data_parallel_shard_degree: int = -1  # ranks that a copy's weights are sharded over (FSDP2); -1: all left
    # whether gathered weights are given up until backward; default: always, but never under pipeline
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    tensor_parallel_degree: int = 1  # ranks that share each matrix, and the tokens and the vocabulary with it
    enable_async_tensor_parallel: bool = False  # overlap TP collectives with matmuls; needs compile and GPUs
    context_parallel_degree: int = 1  # ranks that share each sequence
    # how they see each other's tokens: gathered keys and values, or all-to-all of heads
    context_parallel_method: Literal["allgather", "ulysses"] = "allgather"
    context_parallel_load_balance: bool = True  # deal blocks of a slot by attention cost, not in order
    pipeline_parallel_degree: int = 1  # ranks that share the layers
    # the order of microbatches: GPipe, 1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble
    pipeline_parallel_schedule: str = "1F1B"
    pipeline_parallel_microbatch_size: int = 1  # slots per microbatch
    # first decoder layer of each later stage; empty: by cost
    pipeline_parallel_split_points: list[int] = field(default_factory=list)


@dataclass
class Checkpoint:
    """What is saved, when, and what a run starts from."""

    # save every `interval`, on the last step and on SIGTERM or SIGINT; resume from the latest
    enable: bool = False
    folder: str = "checkpoint"  # where they are, below dump_folder
    interval: int = 500  # steps between two checkpoints
    initial_load_path: str = ""  # start from this checkpoint when the run has none of its own
    initial_load_model_only: bool = True  # of initial_load_path take the weights alone
    initial_load_in_hf: bool = False  # initial_load_path is a Hugging Face folder: config.json, *.safetensors
    # what such a folder may be without an error: missing or otherwise shaped weights then start fresh
    initial_load_allow: list[Literal["missing", "left_over", "shape"]] = field(default_factory=list)
    load_step: int = -1  # resume from this step; -1: the latest complete one
    # async: training goes on while the checkpoint is written
    async_mode: Literal["disabled", "async"] = "disabled"
    keep_latest_k: int = 10  # so many are kept, older ones are deleted; 0: all are kept
    # what starts anew where a run resumes: any of optimizer, lr_scheduler, data, train_state
    exclude_from_loading: list[str] = field(default_factory=list)
    last_save_model_only: bool = False  # the last checkpoint holds the weights alone
    # write the last one as a Hugging Face folder too, to hf/step-N in dump_folder
    last_save_in_hf: bool = False


@dataclass
class ActivationCheckpoint:
    """Which activations are recomputed in backward instead of kept."""

    # in the decoder: none, those that selective_ac_option says, or all
    mode: Literal["none", "selective", "full"] = "none"
    # "op": keep matmuls and attention; an integer n: recompute every n-th layer
    selective_ac_option: str = "op"
    full_layers: int = 0  # with mode = none: so many layers of the decoder, the first ones, as full
    selective_layers: int = 0  # and so many after them as selective with "op"
    # choose these numbers of layers in every tower: the least recomputation whose estimated peak on a GPU is
    # this; 0: as they are given
    memory_budget_gib: float = 0.0

    @property
    def decoder(self) -> Recomputation:
        """Recomputation in the decoder's layers."""
        return Recomputation(self.mode, self.selective_ac_option, self.full_layers, self.selective_layers)


@dataclass
class Compile:
    """Compiled blocks and replayed steps: faster, after a slow first step."""

    enable: bool = False  # torch.compile each block of both towers
    cuda_graphs: bool = False  # replay the whole optimizer step as one CUDA graph; not with a pipeline


@dataclass
class Comm:
    """How long ranks wait for each other before the run fails."""

    init_timeout_seconds: int = 300  # until the first step is done
    train_timeout_seconds: int = 100  # after that; the error names the rank that the others waited for
    trace_buf_size: int = 20000  # calls between ranks that are kept, and written when a run hangs; 0: off


@dataclass
class Validation:
    """Evaluation on held-out data while training."""

    enable: bool = False  # evaluate on validation.sources
    freq: int = 100  # steps between two evaluations; the last step is always evaluated
    steps: int = -1  # batches per evaluation; -1: the held-out split once
    # after the last step evaluate on spoilt held-out data too, in each way that the experiment knows
    controls: bool = False
    # steps between two runs of the experiment's tasks, which take longer; the last step always has one
    task_freq: int = 500


@dataclass
class Debug:
    """Seeds and determinism."""

    seed: int = 0  # of the first weights and of the order of the data
    deterministic: bool = False  # deterministic kernels; slower on GPU


@dataclass
class JobConfig:
    """Every section that the trainer itself reads."""

    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    lora: LoRA = field(default_factory=LoRA)
    float8: Float8 = field(default_factory=Float8)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    comm: Comm = field(default_factory=Comm)
    validation: Validation = field(default_factory=Validation)
    debug: Debug = field(default_factory=Debug)

    def use_single_source(self, given: Collection[str]) -> None:
        """training.dataset, or its path, came on the command line: it takes the place of any list of data.

        `given`: the names of all options that came there.
        """
