"""DINOv3 (Simeoni et al., 2025): class token and registers, positions that turn queries and keys, a learned
scale of what each layer adds, and no bias of the keys.

Its own training shifts and scales the coordinates of an image at random; here they are as they are.
"""

from typing import TYPE_CHECKING, Any

from experiments.vlm.model.config import EncoderConfig
from experiments.vlm.model.towers.tower import Tower, activation, kernel, widths, write_widths
from torchtitan.config.errors import require
from torchtitan.models.hf.config_file import ConfigFile
from torchtitan.models.weight_names import Row, Transform

if TYPE_CHECKING:
    from torch import Tensor

KIND: dict[str, Any] = {
    "model_type": "dinov3_vit",
    "mean": (0.485, 0.456, 0.406),
    "deviation": (0.229, 0.224, 0.225),
    "positions": "rotary",
    "class_token": True,
    "mask_token": True,
    "layer_scale": True,
}
# Values of the published ones up to L; others are read too.
PLAIN: dict[str, Any] = {"registers": 4, "attention_biases": "qvo", "activation": "gelu"}
BIASES = {"q": "query_bias", "k": "key_bias", "v": "value_bias", "o": "proj_bias"}


def _without_batch(vectors: "Tensor") -> "Tensor":
    """[1, 1, D] -> [D]."""
    return vectors.flatten()


def _with_batch(vector: "Tensor") -> "Tensor":
    """[D] -> [1, 1, D]."""
    return vector[None, None]


VECTOR = Transform(_without_batch, _with_batch, whole=True)
REGISTERS = Transform(lambda vectors: vectors.flatten(0, 1), lambda vectors: vectors[None], whole=True)
OWN = [
    Row("embeddings.cls_token", "embedding.cells.class_token", VECTOR),
    Row("embeddings.mask_token", "embedding.mask_token", VECTOR),
    *(
        row
        for layer in ("layer.*", "model.layer.*")  # the second is what its state dict says
        for row in (
            Row(f"{layer}.norm1.*", "layers.*.attention_norm.*"),
            Row(f"{layer}.attention.q_proj.*", "layers.*.attention.wq.*"),
            Row(f"{layer}.attention.k_proj.*", "layers.*.attention.wk.*"),
            Row(f"{layer}.attention.v_proj.*", "layers.*.attention.wv.*"),
            Row(f"{layer}.attention.o_proj.*", "layers.*.attention.wo.*"),
            Row(f"{layer}.layer_scale1.lambda1", "layers.*.attention_scale.weight"),
            Row(f"{layer}.norm2.*", "layers.*.mlp_norm.*"),
            Row(f"{layer}.mlp.gate_proj.*", "layers.*.mlp.gate.*"),
            Row(f"{layer}.mlp.up_proj.*", "layers.*.mlp.fc1.*"),
            Row(f"{layer}.mlp.down_proj.*", "layers.*.mlp.fc2.*"),
            Row(f"{layer}.layer_scale2.lambda1", "layers.*.mlp_scale.weight"),
        )
    ),
    Row("norm.*", "norm.*"),
]


def read(file: ConfigFile) -> EncoderConfig:
    """Sizes of a DINOv3ViTModel."""
    sizes = widths(file, 384, 12, 6, 1536)
    dim, _, heads, _ = sizes
    quarters = f"{file.where}: heads of width {dim // heads}: must be a multiple of 4, for rotary positions"
    require(dim // heads % 4 == 0, quarters)
    kind = KIND | {
        "registers": file.count("num_register_tokens", 0),
        "attention_biases": "".join(name for name, key in BIASES.items() if file.get(key, name != "k")),
        "mlp_bias": file.get("mlp_bias", True),
        "gated_mlp": file.get("use_gated_mlp", False),
        "activation": activation(file, "gelu"),
        "rotary_theta": file.get("rope_theta", 100.0),
    }
    eps = file.get("layer_norm_eps", 1e-5)
    return EncoderConfig(*sizes, file.size("patch_size", 16), norm_eps=eps, **kind)


def write(config: EncoderConfig) -> dict[str, Any]:
    """config.json of a DINOv3ViTModel."""
    biases = {key: name in config.attention_biases for name, key in BIASES.items()}
    return (
        write_widths(config)
        | biases
        | {
            "num_register_tokens": config.registers,
            "mlp_bias": config.mlp_bias,
            "use_gated_mlp": config.gated_mlp,
            "hidden_act": config.activation,
            "rope_theta": config.rotary_theta,
            "layer_norm_eps": config.norm_eps,
        }
    )


def rows(config: EncoderConfig) -> list[Row]:
    """Learned vectors have two dimensions of a batch there."""
    registers = Row("embeddings.register_tokens", "embedding.cells.registers", REGISTERS)
    embedding = kernel("embeddings.patch_embeddings", config.patch_size)
    return [*embedding, *([registers] if config.registers else []), *OWN]


TOWER = Tower(
    "DINOv3ViTModel",
    read,
    write,
    rows,
    # where it is no weight of the encoder
    {"embeddings.register_tokens": "of no rows, since the encoder has no registers"},
    sizes={  # facebook/dinov3-vit*16-pretrain-lvd1689m
        "dinov3-S": EncoderConfig(384, 12, 6, 1536, norm_eps=1e-5, **KIND, **PLAIN),
        "dinov3-B": EncoderConfig(768, 12, 12, 3072, norm_eps=1e-5, **KIND, **PLAIN),
        "dinov3-L": EncoderConfig(1024, 24, 16, 4096, norm_eps=1e-5, **KIND, **PLAIN),
    },
)
