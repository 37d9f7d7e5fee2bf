"""A decoder's sizes in the words of Hugging Face: LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config.

Imports no torch. Defaults are those of the classes of transformers 5.24.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torchtitan.config.errors import ConfigError, require
from torchtitan.layers.rope_scaling import RopeScaling
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.hf.config_file import ConfigFile


class Family(NamedTuple):
    """What the class of a model_type takes where a file says nothing, and what it cannot be here."""

    architecture: str  # its causal language model
    vocab_size: int
    mlp_dim: int
    context: int
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: the width divided by the heads
    window: int | None = None  # tokens that a query sees
    refuse: Callable[[ConfigFile], None] = lambda file: None


def _no_window(file: ConfigFile) -> None:
    file.refuse_all_but("use_sliding_window", False)


def _no_biases(file: ConfigFile) -> None:
    file.refuse_all_but("attention_bias", False)
    file.refuse_all_but("mlp_bias", False)


def _qwen3(file: ConfigFile) -> None:
    _no_window(file)
    _no_biases(file)


FAMILIES = {
    "llama": Family("LlamaForCausalLM", 32000, 11008, 2048, refuse=_no_biases),
    "mistral": Family("MistralForCausalLM", 32000, 14336, 131072, kv_heads=8, window=4096),
    "qwen2": Family("Qwen2ForCausalLM", 151936, 22016, 32768, kv_heads=32, refuse=_no_window),
    "qwen3": Family("Qwen3ForCausalLM", 151936, 22016, 32768, kv_heads=32, head_dim=128, refuse=_qwen3),
}


def decoder_config(file: ConfigFile, tied: bool | None = None) -> DecoderConfig:
    """A decoder's sizes from a config.json. `tied`: what stands above this section; None: what it says
    itself. Raises ConfigError for what the decoder is not.
    """
    kind = file.model_type
    require(
        kind in FAMILIES,
        f"{file.where}: model_type = {kind!r}: no decoder of that kind here; known: {', '.join(FAMILIES)}",
    )
    family = FAMILIES[kind]
    file.refuse_all_but("hidden_act", "silu")
    file.refuse_all_but("is_causal", True)
    family.refuse(file)
    layers = file.values.get("layer_types") or []
    for layer in layers if isinstance(layers, list) else [layers]:
        full = f"{file.where}: layer_types has {layer!r}: not supported here, only 'full_attention'"
        require(layer == "full_attention", full)
    dim, heads = file.size("hidden_size", 4096), file.size("num_attention_heads", 32)
    said = "num_key_value_heads" in file.values  # null: as many as heads, also where the default is less
    kv_heads = file.size("num_key_value_heads", heads if said else family.kv_heads or heads)
    require(heads % kv_heads == 0, f"{file.where}: {kv_heads} key/value heads do not divide {heads} heads")
    theta, scaling = _rope(file)
    return DecoderConfig(
        dim,
        file.size("num_hidden_layers", 32),
        heads,
        kv_heads,
        file.size("head_dim", family.head_dim or dim // heads),
        file.size("intermediate_size", family.mlp_dim),
        file.size("vocab_size", family.vocab_size),
        theta,
        scaling,
        norm_eps=file.get("rms_norm_eps", 1e-6),
        tied_embeddings=file.get("tie_word_embeddings", False) if tied is None else tied,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        context=file.size("max_position_embeddings", family.context),
        window=_window(file, family),
        model_type=kind,
    )


def _window(file: ConfigFile, family: Family) -> int | None:
    """The sliding window. Null means none here, not the default of a class that has one."""
    if family.window is None or ("sliding_window" in file.values and file.values["sliding_window"] is None):
        return None
    return file.size("sliding_window", family.window)


def _rope(file: ConfigFile) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling: rope_parameters, or rope_theta and rope_scaling (before transformers 5).

    Where both are there rope_scaling counts, as in transformers: people add it to lengthen a context.
    """
    rope = file.section("rope_scaling" if file.values.get("rope_scaling") else "rope_parameters")
    theta = rope.get("rope_theta", file.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(
        kind in ("default", "llama3"),
        f"{rope.where}: rope_type = {kind!r}: not supported here, only default and llama3",
    )
    for whole in (file, rope):
        whole.refuse_all_but("partial_rotary_factor", 1.0)
    if kind == "default":
        return theta, None
    needed = ("factor", "original_max_position_embeddings")
    missing = [name for name in needed if rope.values.get(name) is None]
    if missing:
        raise ConfigError(f"{rope.where}: {missing[0]} is missing, which rope_type = 'llama3' needs")
    return theta, RopeScaling(
        rope.get("factor", 1.0),
        rope.get("low_freq_factor", 1.0),
        rope.get("high_freq_factor", 4.0),
        rope.size("original_max_position_embeddings", 8192),
    )


def model_type_of(config: DecoderConfig) -> str:
    """The model_type of the class that computes what the decoder does; rows of sizes do not name theirs."""
    return config.model_type or ("qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama")


def architecture_of(config: DecoderConfig) -> str:
    """The name of its causal language model in transformers."""
    return FAMILIES[model_type_of(config)].architecture


def hf_config(config: DecoderConfig, vocab_size: int) -> dict[str, Any]:
    """config.json of the decoder; rotary settings in both spellings, so that older releases read them."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    kind = model_type_of(config)
    return {
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        **({"sliding_window": config.window} if kind == "mistral" else {}),
        "use_cache": True,
    }
