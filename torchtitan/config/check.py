"""Every cross-check of a job that knows nothing of images: a wrong one is refused before it is built.

`check` runs them all. What a model or an experiment adds (heads that tensor parallel divides, patches) is
checked next to it: torchtitan/models/decoder/check.py, experiments/vlm/check.py. Imports no torch.
"""

import importlib.metadata
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torchtitan.config.devices import visible_gpus
from torchtitan.config.errors import ConfigError, did_you_mean, require
from torchtitan.config.float8 import check_float8
from torchtitan.config.job import ActivationCheckpoint, JobConfig
from torchtitan.config.layout import BALANCE_BLOCKS, STAGES_PER_RANK, Degrees, degrees, resolve_batch
from torchtitan.config.shipped import shipped
from torchtitan.tools.hub import get_it

# What a number may be. The text is both the rule and what the error says: " or " between ranges, ", " inside
# one.
RANGES = {
    "profiling.profile_freq": ">= 1",
    "metrics.log_freq": ">= 1",
    "optimizer.lr": "> 0",
    "optimizer.muon_lr": "> 0",
    "optimizer.muon_momentum": ">= 0, < 1",
    "optimizer.beta1": ">= 0, < 1",
    "optimizer.beta2": ">= 0, < 1",
    "optimizer.eps": "> 0",
    "optimizer.weight_decay": ">= 0",
    "lr_scheduler.warmup_steps": ">= 0",
    "lr_scheduler.decay_ratio": "> 0, <= 1",
    "lr_scheduler.min_lr_factor": ">= 0, <= 1",
    "training.local_batch_size": ">= 1",
    "training.global_batch_size": "-1 or >= 1",
    "training.seq_len": ">= 2",
    "training.max_norm": ">= 0",
    "training.steps": ">= 1",
    "training.loss_chunk_tokens": ">= 1",
    "training.gc_freq": ">= 1",
    "lora.rank": ">= 0",
    "lora.alpha": "> 0",
    "lora.dropout": ">= 0, < 1",
    "parallelism.data_parallel_replicate_degree": ">= 1",
    "parallelism.data_parallel_shard_degree": "-1 or >= 1",
    "parallelism.tensor_parallel_degree": ">= 1",
    "parallelism.context_parallel_degree": ">= 1",
    "parallelism.pipeline_parallel_degree": ">= 1",
    "parallelism.pipeline_parallel_microbatch_size": ">= 1",
    "checkpoint.interval": ">= 1",
    "checkpoint.load_step": "-1 or >= 0",
    "checkpoint.keep_latest_k": ">= 0",
    "activation_checkpoint.full_layers": ">= 0",
    "activation_checkpoint.selective_layers": ">= 0",
    "activation_checkpoint.memory_budget_gib": ">= 0",
    "comm.init_timeout_seconds": ">= 1, <= 31536000",
    "comm.train_timeout_seconds": ">= 1, <= 31536000",
    "comm.trace_buf_size": ">= 0, <= 10000000",
    "validation.freq": ">= 1",
    "validation.steps": "-1 or >= 1",
    "validation.task_freq": ">= 1",
    "debug.seed": ">= 0, <= 4294967295",
}
GROUP_RANGES = {
    "lr": "> 0",
    "muon_lr": "> 0",
    "weight_decay": ">= 0",
    "schedule_factor": "> 0",
    "layer_decay": "> 0, <= 1",
}
COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
# Of a checkpoint, what may be left out when it is loaded: all but the weights.
NOT_LOADED = ("optimizer", "lr_scheduler", "data", "train_state")


def check(job: JobConfig, world_size: int) -> None:
    """Run all checks. Raises ConfigError for the first thing that is wrong."""
    check_ranges(job, RANGES)
    sizes = degrees(job.parallelism, world_size)
    check_paths(job)
    check_devices(job)
    check_cuda_graphs(job)
    check_float8(job)
    check_loading(job)
    check_selective(job)
    check_patterns(job)
    resolve_batch(job, world_size)
    check_sequence(job, sizes)
    check_pipeline(job, sizes)


def check_ranges(job: Any, ranges: Mapping[str, str]) -> None:
    """Check numbers. `ranges`: "section.field" -> what it may be, as in RANGES. None is always allowed."""
    for key, allowed in ranges.items():
        section, field = key.split(".")
        value = getattr(getattr(job, section), field)
        require(value is None or is_allowed(value, allowed), f"{key} = {value}: must be {allowed}")


def check_options(options: Any, rules: Mapping[str, str]) -> None:
    """Check a command's own options: name -> what it may be, as in RANGES. Raises ConfigError."""
    for name, allowed in rules.items():
        value = getattr(options, name)
        require(is_allowed(value, allowed), f"--{name} = {value}: must be {allowed}")


def is_allowed(value: float, allowed: str) -> bool:
    """Whether a number satisfies a rule as in RANGES. Infinity and NaN never do."""
    return math.isfinite(value) and any(
        all(_holds(value, condition) for condition in arm.split(", ")) for arm in allowed.split(" or ")
    )


def _holds(value: float, condition: str) -> bool:
    sign, _, bound = condition.rpartition(" ")
    return COMPARISONS[sign](value, float(bound)) if sign else value == float(bound)


def check_paths(job: JobConfig) -> None:
    """Folders stay below job.dump_folder; the tokenizer is there, unless a dry run does without."""
    folder, tokenizer = Path(job.job.dump_folder), shipped(job.model.tokenizer_path)
    require(
        bool(job.job.dump_folder) and (folder.is_dir() or not folder.exists()),
        f"job.dump_folder = {folder}: is not a folder",
    )
    for key in (
        "profiling.save_traces_folder",
        "profiling.save_memory_snapshot_folder",
        "metrics.save_tb_folder",
        "checkpoint.folder",
    ):
        section, field = key.split(".")
        below = getattr(getattr(job, section), field)
        inside = bool(Path(below).parts) and not Path(below).is_absolute() and ".." not in Path(below).parts
        require(
            inside, f"{key} = {below!r}: must be a path below job.dump_folder, without a leading / and .."
        )
    there = tokenizer.exists() or job.job.dry_run  # which can do without
    key = f"model.tokenizer_path = {tokenizer}"
    require(there, f"{key}: no such file or folder (looked from {Path.cwd()}); {get_it(tokenizer)}")
    if tokenizer.is_dir():
        holds_one = any((tokenizer / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
        nothing = f"{key}: holds neither tokenizer.model nor tokenizer.json"
        require(holds_one, f"{nothing}; {get_it(tokenizer)}")


def check_devices(job: JobConfig) -> None:
    """Refuse what needs a GPU or a compiler pass that is not there."""
    p = job.parallelism
    if p.enable_async_tensor_parallel:
        needs = "parallelism.enable_async_tensor_parallel needs"
        require(p.tensor_parallel_degree > 1, f"{needs} parallelism.tensor_parallel_degree > 1")
        require(job.compile.enable, f"{needs} compile.enable")
    needs_gpu = {
        "parallelism.enable_async_tensor_parallel": p.enable_async_tensor_parallel,
        "compile.cuda_graphs": job.compile.cuda_graphs,
        "float8.enable without float8.emulate": job.float8.enable and not job.float8.emulate,
        "profiling.enable_memory_snapshot": job.profiling.enable_memory_snapshot,
        "training.enable_cpu_offload": job.training.enable_cpu_offload,
        "model.attention_backend = flex (no backward on CPU; use auto or sdpa)": (
            job.model.attention_backend == "flex"
        ),
    }
    for key, wanted in needs_gpu.items():
        require(not wanted or visible_gpus() > 0, f"{key} needs a GPU, and none is visible")


def check_cuda_graphs(job: JobConfig) -> None:
    """Refuse with CUDA graphs what has not been shown to be exact inside one."""
    needs = "compile.cuda_graphs needs"
    if job.compile.cuda_graphs:
        # A schedule's sends and receives have not been shown to be exact inside a graph.
        pp = job.parallelism.pipeline_parallel_degree
        require(pp == 1, f"{needs} parallelism.pipeline_parallel_degree = 1, not {pp}")
        # No GPU has shown that the last group, gathered again when backward begins, is captured right.
        policy = job.parallelism.fsdp_reshard_after_forward
        require(
            policy != "always",
            f"{needs} parallelism.fsdp_reshard_after_forward = default or never, not {policy}",
        )
        # Activation checkpointing has to draw the same numbers again, which a graph has not been shown to do.
        require(job.lora.dropout == 0, f"{needs} lora.dropout = 0, not {job.lora.dropout}")
        require(
            not job.training.enable_cpu_offload,
            f"{needs} training.enable_cpu_offload off: a graph cannot wait for the host",
        )


def check_loading(job: JobConfig) -> None:
    """Options of [checkpoint] and [validation] that need each other, and the folder to load from."""
    c, path = job.checkpoint, job.checkpoint.initial_load_path
    untrained = job.job.dry_run and bool(job.model.flavor)
    require(
        # An experiment checks Hugging Face folders itself. The stage before may not be trained yet.
        not path or Path(path).is_dir() or c.initial_load_in_hf or untrained,
        f"checkpoint.initial_load_path = {path}: no such folder (looked from {Path.cwd()})",
    )
    needs = "needs checkpoint.initial_load_in_hf"
    require(c.initial_load_in_hf or not c.initial_load_allow, f"checkpoint.initial_load_allow {needs}")
    require(
        not c.initial_load_in_hf or c.initial_load_model_only,
        "checkpoint.initial_load_in_hf loads weights alone: checkpoint.initial_load_model_only must be on",
    )
    for name in c.exclude_from_loading:
        require(
            name in NOT_LOADED,
            f"checkpoint.exclude_from_loading = {name}: is no part{did_you_mean(name, NOT_LOADED)}",
        )
    require(c.enable or c.load_step == -1, f"checkpoint.load_step = {c.load_step} needs checkpoint.enable")
    for key in ("last_save_model_only", "last_save_in_hf"):
        require(c.enable or not getattr(c, key), f"checkpoint.{key} needs checkpoint.enable")
    v = job.validation
    require(
        v.enable or not v.controls,
        "validation.controls needs validation.enable; --validation.no_controls turns it off",
    )


def check_selective(job: JobConfig) -> None:
    """`selective_ac_option` is "op" or a whole number; numbers of layers and a budget go with no mode."""
    ac = job.activation_checkpoint
    option = ac.selective_ac_option
    valid = option == "op" or (option.isdecimal() and int(option) >= 1)
    require(
        valid,
        f'activation_checkpoint.selective_ac_option = {option}: must be "op" or a whole number >= 1, as a '
        "text",
    )
    for layers, number in _of_all_towers(ac, "_layers").items():
        prefix = layers.removesuffix("full_layers").removesuffix("selective_layers")
        mode = getattr(ac, f"{prefix}mode")
        speaks = f"activation_checkpoint.{layers} = {number}"
        require(
            not number or mode == "none",
            f"{speaks} says of which layers activation_checkpoint.{prefix}mode = {mode} is to hold for all: "
            f"leave {prefix}mode at none, or {layers} at 0",
        )
    for key, mode in _of_all_towers(ac, "mode").items():
        require(
            not ac.memory_budget_gib or mode == "none",
            f"activation_checkpoint.memory_budget_gib = {ac.memory_budget_gib:g} chooses what every layer "
            f"keeps: leave {key} at none",
        )


def _of_all_towers(ac: ActivationCheckpoint, ending: str) -> dict[str, Any]:
    """Options by name. An experiment's other towers have their own: PREFIX_full_layers, PREFIX_mode."""
    return {field.name: getattr(ac, field.name) for field in fields(ac) if field.name.endswith(ending)}


def check_patterns(job: JobConfig) -> None:
    """Check that they are regular expressions; what they match is known once the model is built."""
    for pattern in job.training.freeze:
        check_pattern("training.freeze", pattern)
    adapter = job.lora.initial_load_path
    require(not adapter or job.lora.rank > 0, f"lora.initial_load_path = {adapter} needs lora.rank")
    there = not adapter or Path(adapter, "adapter_config.json").is_file()
    require(
        there, f"lora.initial_load_path = {adapter}: holds no adapter_config.json (looked from {Path.cwd()})"
    )
    require(bool(job.lora.patterns), "lora.patterns is empty: name the parts or maps that get adapters")
    for pattern in job.lora.patterns:
        check_pattern("lora.patterns", pattern)
    require(bool(job.float8.patterns), "float8.patterns is empty: name the parts or maps that compute in fp8")
    for pattern in job.float8.patterns:
        check_pattern("float8.patterns", pattern)
    names = [group.name or group.pattern for group in job.optimizer.groups]
    for number, group in enumerate(job.optimizer.groups):
        key = f"optimizer.groups[{number}]"
        check_pattern(f"{key}.pattern", group.pattern)
        for field, allowed in GROUP_RANGES.items():
            value = getattr(group, field)
            require(
                value is None or is_allowed(value, allowed), f"{key}.{field} = {value}: must be {allowed}"
            )
        needs_muon = group.muon_lr is None or job.optimizer.name == "Muon"
        require(needs_muon, f"{key}.muon_lr = {group.muon_lr} needs optimizer.name = Muon")
        twice = names.index(names[number]) < number
        require(not twice, f"{key}: another group is called {names[number]} too; give each its own name")


def check_pattern(key: str, pattern: str) -> None:
    """Raises ConfigError, which names the option `key`."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key} = {pattern}: no regular expression ({error})") from None
    require(bool(pattern), f"{key} is empty: name a part, or a pattern of parameter names")


def check_sequence(job: JobConfig, sizes: Degrees) -> None:
    """Every rank of a context- and tensor-parallel group holds as many tokens as the others."""
    p, length = job.parallelism, job.training.seq_len
    balanced = sizes.cp > 1 and p.context_parallel_load_balance and p.context_parallel_method == "allgather"
    parts = {"parallelism.context_parallel_degree": sizes.cp, "parallelism.tensor_parallel_degree": sizes.tp}
    named = " * ".join(f"{key} ({degree})" for key, degree in parts.items() if degree > 1)
    require(length % (sizes.cp * sizes.tp) == 0, f"training.seq_len = {length} is not a multiple of {named}")
    blocks = sizes.cp * BALANCE_BLOCKS
    require(
        not balanced or length % blocks == 0,
        f"training.seq_len = {length} is not a multiple of {blocks} "
        "(parallelism.context_parallel_load_balance deals "
        f"{BALANCE_BLOCKS} blocks to each of {sizes.cp} ranks): change it, or switch the balance off",
    )


def check_pipeline(job: JobConfig, sizes: Degrees) -> None:
    """Schedule, split points and microbatches fit the stages."""
    p, name = job.parallelism, job.parallelism.pipeline_parallel_schedule
    known = did_you_mean(name, STAGES_PER_RANK)
    require(
        name in STAGES_PER_RANK, f"parallelism.pipeline_parallel_schedule = {name}: no such schedule{known}"
    )
    if sizes.pp == 1:
        points = "parallelism.pipeline_parallel_split_points"
        require(
            not p.pipeline_parallel_split_points, f"{points} needs parallelism.pipeline_parallel_degree > 1"
        )
        return
    check_microbatches(job, sizes)
    if name.endswith("ZeroBubble"):
        check_zero_bubble(job)


def check_microbatches(job: JobConfig, sizes: Degrees) -> None:
    """local_batch_size cuts into microbatches, enough of them for the schedule."""
    size = job.parallelism.pipeline_parallel_microbatch_size
    local = job.training.local_batch_size
    name = job.parallelism.pipeline_parallel_schedule
    key = f"parallelism.pipeline_parallel_microbatch_size = {size}"
    require(local % size == 0, f"{key} does not divide training.local_batch_size ({local})")
    count = local // size
    if name == "1F1B":
        require(
            count >= sizes.pp,
            f"{key} makes {count} microbatches, fewer than the {sizes.pp} stages: raise "
            "training.local_batch_size",
        )
    if name.startswith("Interleaved"):
        # of microbatches through the ranks, as torch.distributed.pipelining counts them
        rounds = max(1, count // sizes.pp)
        require(
            count % rounds == 0,
            f"{key} makes {count} microbatches, which {name} cannot deal in {rounds} equal rounds",
        )


def zero_bubble_works() -> bool:
    """Whether this torch can split the backward of FSDP and attention."""
    return tuple(map(int, importlib.metadata.version("torch").split(".")[:2])) >= (2, 13)


def check_zero_bubble(job: JobConfig) -> None:
    """Refuse what makes its gradients wrong without an error, or raises deep inside the schedule."""
    name = f"parallelism.pipeline_parallel_schedule = {job.parallelism.pipeline_parallel_schedule}"
    ac = job.activation_checkpoint
    require(
        zero_bubble_works(),
        f"{name} needs torch 2.13: before, it cannot split the backward of FSDP and of attention; use 1F1B",
    )
    reshards = job.parallelism.fsdp_reshard_after_forward == "always"
    require(
        not reshards,
        f"{name} gives wrong gradients with parallelism.fsdp_reshard_after_forward = always: use never",
    )
    require(not job.compile.enable, f"{name} may give wrong gradients with compile.enable: switch one off")
    for key, mode in _of_all_towers(ac, "mode").items():
        require(
            mode != "selective",
            f"{name} cannot run with activation_checkpoint.{key} = selective: use full or none",
        )
    for key, number in _of_all_towers(ac, "selective_layers").items():
        require(not number, f"{name} cannot run with activation_checkpoint.{key}: use full_layers")
