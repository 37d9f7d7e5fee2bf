"""Megatron's CLIP, projector and Mistral (examples/multimodal) as tensors of a Hugging Face folder.

    iter_0000001/mp_rank_00/model_optim_rng.pt      {"model": state dict}, one for each of the t ranks of TP

q, k and v are one map, head by head, or group by group where heads share keys. The tower is read after its
last layer without a norm, which is not stored, and its class token is dropped. A combined file has
vision_model., vision_projection. and language_model. before the names; one of a part alone has nothing.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.vlm.weights.megatron_ranks import MegatronRanks
from torchtitan.config.errors import ConfigError, require
from torchtitan.models.hf.writing import TensorToWrite
from torchtitan.models.weight_names import Part, Piece, Row, Transform, prefixed, to_ours

PREFIXES = {
    "encoder": "vision_model.",
    "projector": "vision_projection.encoder.",
    "decoder": "language_model.",
}
ALONE = {"encoder": "class_token", "decoder": "embedding.word_embeddings.weight"}  # what only it has
HF = {"encoder": "vision_tower.", "projector": "multi_modal_projector.", "decoder": "language_model."}
CLASSES = {"encoder": "CLIPVisionModel", "decoder": "MistralForCausalLM"}


@dataclass(frozen=True)
class Heads:
    """What no shape says."""

    encoder: int = 64  # width of a head
    decoder: int = 128


@dataclass(frozen=True)
class FolderContent:
    """A folder: which parts it holds, what config.json says of them, and their tensors."""

    parts: tuple[str, ...]
    config: dict[str, Any]
    tensors: dict[str, TensorToWrite]


def _heads(which: int, head: int, shared: int, rows: Tensor) -> Tensor:
    """The rows of q, k or v. `shared`: heads of q for each of k."""
    groups = rows.unflatten(0, (-1, shared + 2, head))
    picked = (groups[:, :shared], groups[:, shared], groups[:, shared + 1])[which]
    return picked.reshape(-1, *rows.shape[1:])


def _both(theirs: str, ours: str) -> list[Row]:
    return [Row(f"{theirs}{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]


def _layer(head: int, shared: int, attention_norm: str, mlp_norm: str) -> list[Row]:
    """What layers of both towers have. Norms are modules, or, by Transformer Engine, in the map behind."""
    qkv, fc1 = "self_attention.linear_qkv.", "mlp.linear_fc1."
    rows = [
        Row(qkv + kind, f"self_attn.{name}_proj.{kind}", transform, Part(number, 3, first=0))
        for number, name in enumerate("qkv")
        for transform in [Transform(partial(_heads, number, head, shared), whole=True)]
        for kind in ("weight", "bias")
    ]
    for place in ("input_layernorm.", f"{qkv}layer_norm_"):
        rows += _both(place, attention_norm)
    for place in ("pre_mlp_layernorm.", f"{fc1}layer_norm_"):
        rows += _both(place, mlp_norm)
    return rows


def encoder_rows(head: int) -> list[Row]:
    """Names of CLIPVisionModel."""
    layer = [
        *_layer(head, 1, "layer_norm1", "layer_norm2"),
        *_both("self_attention.linear_proj.", "self_attn.out_proj"),
        *_both("mlp.linear_fc1.", "mlp.fc1"),
        *_both("mlp.linear_fc2.", "mlp.fc2"),
    ]
    return [
        Row("class_token", "embeddings.class_embedding", Transform(torch.flatten, whole=True)),
        Row("position_embeddings.weight", "embeddings.position_embedding.weight"),
        Row("conv1.weight", "embeddings.patch_embedding.weight"),
        *_both("ln_pre.", "pre_layrnorm"),
        *prefixed(layer, "decoder.layers.*.", "encoder.layers.*."),
    ]


def decoder_rows(head: int, shared: int) -> list[Row]:
    """Names of MistralForCausalLM."""
    layer = [
        *_layer(head, shared, "input_layernorm", "post_attention_layernorm"),
        Row("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        Row("mlp.linear_fc1.weight", "mlp.gate_proj.weight", theirs_part=Part(0, 2)),
        Row("mlp.linear_fc1.weight", "mlp.up_proj.weight", theirs_part=Part(1, 2)),
        Row("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    ]
    return [
        Row("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Row("output_layer.weight", "lm_head.weight"),
        Row("decoder.final_layernorm.weight", "model.norm.weight"),
        *prefixed(layer, "decoder.layers.*.", "model.layers.*."),
    ]


PROJECTOR = [*_both("linear_fc1.", "linear_1"), *_both("linear_fc2.", "linear_2")]


class PartSizes:
    """Sizes of one part, by the shapes of its tensors."""

    def __init__(self, ranks: MegatronRanks, prefix: str):
        self.ranks, self.prefix = ranks, prefix

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ConfigError where the tensor is missing."""
        whole = self.prefix + name
        require(whole in self.ranks.states[0], f"{self.ranks.folder}: has no tensor {whole}")
        return self.ranks.shape(whole)

    @property
    def layers(self) -> int:
        """How many there are."""
        start = re.compile(re.escape(f"{self.prefix}decoder.layers.") + r"(\d+)\.")
        return len({found[1] for name in self.ranks.states[0] if (found := start.match(name))})

    def heads(self, head: int, option: str) -> tuple[int, int]:
        """Heads of q, and of k. Raises ConfigError where they are of another width."""
        attention = "decoder.layers.0.self_attention.linear_"
        columns, rows = self.shape(f"{attention}proj.weight")[1], self.shape(f"{attention}qkv.weight")[0]
        q, kv = columns // head, (rows - columns) // (2 * head)
        fit = columns == q * head and rows - columns == 2 * kv * head and kv > 0 and q % kv == 0
        sizes = (
            f"{self.ranks.folder}: heads of {head} do not make {columns} columns and {rows} rows of q, k, v"
        )
        require(fit, f"{sizes}: say how wide they are with {option}")
        return q, kv


def encoder_config(sizes: PartSizes, head: int) -> dict[str, Any]:
    """config.json of a CLIPVisionModel."""
    dim, _, patch, _ = sizes.shape("conv1.weight")
    heads, _ = sizes.heads(head, "--encoder_head_dim")
    side = math.isqrt(sizes.shape("position_embeddings.weight")[0] - 1)
    return {
        "model_type": "clip_vision_model",
        "hidden_size": dim,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": heads,
        "intermediate_size": sizes.shape("decoder.layers.0.mlp.linear_fc1.weight")[0],
        "patch_size": patch,
        "image_size": side * patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def decoder_config(sizes: PartSizes, head: int, rope_theta: float) -> dict[str, Any]:
    """config.json of a MistralForCausalLM without a window."""
    rows, dim = sizes.shape("embedding.word_embeddings.weight")
    heads, kv_heads = sizes.heads(head, "--decoder_head_dim")
    return {
        "model_type": "mistral",
        "vocab_size": rows,
        "hidden_size": dim,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": sizes.shape("decoder.layers.0.mlp.linear_fc1.weight")[0] // 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": f"{sizes.prefix}output_layer.weight" not in sizes.ranks.states[0],
    }


def projector_config(sizes: PartSizes | None, decoder: Mapping[str, Any]) -> dict[str, Any]:
    """The projector's part of LLaVA's config.json; as Megatron makes a new one where there is none."""
    if sizes is None:
        return {"projector_hidden_size": decoder["intermediate_size"], "multimodal_projector_bias": False}
    bias = sizes.prefix + "linear_fc1.bias" in sizes.ranks.states[0]
    return {"projector_hidden_size": sizes.shape("linear_fc1.weight")[0], "multimodal_projector_bias": bias}


def read(folder: Path, heads: Heads, rope_theta: float) -> FolderContent:
    """What the files of all ranks hold. Raises ConfigError for anything but the models above."""
    ranks = MegatronRanks(folder)
    names = ranks.states[0]
    found = {part: prefix for part, prefix in PREFIXES.items() if any(n.startswith(prefix) for n in names)}
    found = found or {part: "" for part, name in ALONE.items() if name in names}
    nothing = f"{folder}: neither vision_model. and language_model. nor the names of CLIP or Mistral alone"
    require("encoder" in found or "decoder" in found, nothing)
    sizes = {part: PartSizes(ranks, prefix) for part, prefix in found.items()}
    rows, parts = {"projector": PROJECTOR}, {}
    if "encoder" in found:
        rows["encoder"] = encoder_rows(heads.encoder)
        parts["encoder"] = encoder_config(sizes["encoder"], heads.encoder)
    if "decoder" in found:
        parts["decoder"] = decoder_config(sizes["decoder"], heads.decoder, rope_theta)
        q, kv = (parts["decoder"][f"num_{kind}_heads"] for kind in ("attention", "key_value"))
        rows["decoder"] = decoder_rows(heads.decoder, q // kv)
    whole = len(parts) == 2
    placed = [prefixed(rows[part], found[part], HF[part] if whole else "") for part in found]
    tensors = _made(ranks, [row for part in placed for row in part])
    if "encoder" in found:
        tensors |= _last_norm(HF["encoder"] if whole else "", parts["encoder"]["hidden_size"])
    if not whole:
        ((part, config),) = parts.items()
        return FolderContent((part,), config | {"architectures": [CLASSES[part]]}, tensors)
    return FolderContent(
        tuple(found), _whole(parts, projector_config(sizes.get("projector"), parts["decoder"])), tensors
    )


def _whole(parts: Mapping[str, dict[str, Any]], projector: dict[str, Any]) -> dict[str, Any]:
    return projector | {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": parts["encoder"],
        "text_config": parts["decoder"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    }


def _made(ranks: MegatronRanks, rows: list[Row]) -> dict[str, TensorToWrite]:
    counts = {name: (ranks.shape(name) or (1,))[0] for name in ranks.states[0]}
    try:
        pieces = to_ours(counts, rows)
    except ValueError as error:
        raise ConfigError(f"{ranks.folder}: {error}") from None
    more = f" (and {len(pieces.unused) - 1} more)" if len(pieces.unused) > 1 else ""
    unknown = f"{ranks.folder}: {pieces.unused[:1]}{more} is nothing of CLIP, a projector or Mistral"
    require(not pieces.unused, unknown)
    made = {}
    for name, (piece,) in sorted(pieces.of.items()):
        stored = ranks.states[0][piece.source]
        inside = torch.empty(len(piece.rows), *ranks.shape(piece.source)[1:], device="meta")
        shape = tuple(piece.transform(inside).shape)
        made[name] = TensorToWrite(shape, stored.dtype, partial(_rows, ranks, piece))
    return made


def _rows(ranks: MegatronRanks, piece: Piece) -> list[Tensor]:
    gated = piece.source.endswith("linear_fc1.weight") and len(piece.rows) < ranks.shape(piece.source)[0]
    whole = ranks.whole(piece.source, halves=gated)
    return [piece.transform(whole[piece.rows.start : piece.rows.stop])]


def _last_norm(prefix: str, dim: int) -> dict[str, TensorToWrite]:
    """The tower's last norm, which is neither stored nor read."""
    return {
        f"{prefix}post_layernorm.weight": TensorToWrite((dim,), torch.float32, lambda: [torch.ones(dim)]),
        f"{prefix}post_layernorm.bias": TensorToWrite((dim,), torch.float32, lambda: [torch.zeros(dim)]),
    }
