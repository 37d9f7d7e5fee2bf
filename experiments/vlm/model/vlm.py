"""A native-resolution vision-language model: encoder -> projector -> placed among embeddings -> decoder.

In: the tensors of a batch (experiments/vlm/batch.py). Out: their summed loss.

Unusual here: every shape is fixed, images or not. Visual tokens reach their places by a gather inside the
slot, so the device never waits for the host, and a batch without images runs the same code on padding.

Letters: B slots, S tokens, N patch rows (a slot owns N / B of them), L patches, C values a patch, D width of
the decoder, V visual tokens of a slot.
"""

from collections.abc import Collection
from functools import reduce

import torch
from einops import rearrange
from torch import Tensor, nn

from experiments.vlm.model import vit
from experiments.vlm.model.config import ProjectorConfig, VLMConfig
from torchtitan.layers.init import Fill, constant, fan_in, initialise
from torchtitan.layers.lora import is_adapters
from torchtitan.layers.masks import Mask
from torchtitan.models.decoder import model as decoder


class Projector(nn.Module):
    """m * m neighbouring patches become a visual token (pixel unshuffle), then linear maps and activations.

    The loader puts the patches of a visual token next to each other, so merging is a view.
    """

    def __init__(self, config: ProjectorConfig, encoder_dim: int, dim: int):
        super().__init__()
        self.config = config
        self.merged = config.merge_size**2
        width = encoder_dim * self.merged
        normed = encoder_dim if config.norm_first else width
        self.norm = nn.LayerNorm(normed, config.norm_eps) if config.layer_norm else nn.Identity()
        widths = [width, *[config.hidden_dim] * (config.linears - 1), dim]
        for number in range(config.linears):
            linear = nn.Linear(widths[number], widths[number + 1], bias=config.bias)
            setattr(self, f"linear_{number + 1}", linear)
        if config.newline:
            self.newline = nn.Parameter(torch.zeros(dim))

    def forward(self, x_NLD: Tensor) -> Tensor:
        """[N, L, encoder dim] -> [N, L / m^2, D]; with a newline one vector more, the same in every row.

        The newline is written here since elsewhere a rank would hold only a shard of it.
        """
        config, activation = self.config, vit.ACTIVATIONS[self.config.activation]
        x = self.norm(x_NLD) if config.norm_first else x_NLD
        x = rearrange(x, "N (V m) D -> N V (m D)", m=self.merged)
        x = x if config.norm_first else self.norm(x)
        for number in range(1, config.linears + 1):
            x = self.get_submodule(f"linear_{number}")(activation(x) if number > 1 else x)
        return torch.cat([x, self.newline.to(x.dtype).expand(len(x), 1, -1)], 1) if config.newline else x


def visual_table(visual_NVD: Tensor, slots: int, newline: bool) -> Tensor:
    """Vectors of each patch row to those of each slot: its rows one after the other, then a newline."""
    rows_BNVD = rearrange(visual_NVD, "(B n) v D -> B n v D", B=slots)
    if not newline:
        return rows_BNVD.flatten(1, 2)
    return torch.cat([rows_BNVD[:, :, :-1].flatten(1, 2), rows_BNVD[:, 0, -1:]], 1)


def place_visual_tokens(
    h_BSD: Tensor,
    visual_BVD: Tensor,
    visual_index_BS: Tensor,
    taps_BSK: Tensor | None = None,
    weights_BSK: Tensor | None = None,
) -> Tensor:
    """Visual token `visual_index` of the slot, with taps their weighted sum; where it is < 0, the text.

    Fixed shape, no synchronisation.
    """
    S, V = h_BSD.shape[1], visual_BVD.shape[1]
    is_visual_BS1 = (visual_index_BS >= 0)[..., None]
    # Text reads rows in turn and throws them away: all of it on row 0 would pile its gradient on one address.
    spread_S = torch.arange(S, device=h_BSD.device) % V

    numbers = visual_index_BS[..., None] if taps_BSK is None else taps_BSK
    rows_BSK = torch.where(is_visual_BS1, numbers, spread_S[:, None])
    picked = [visual_BVD.gather(1, row_BS1.expand_as(h_BSD)) for row_BS1 in rows_BSK.split(1, -1)]
    if weights_BSK is not None:
        picked = [each * weight for each, weight in zip(picked, weights_BSK.split(1, -1), strict=True)]
    found_BSD = reduce(torch.add, picked)
    return torch.where(is_visual_BS1, found_BSD.to(h_BSD.dtype), h_BSD)


class VLM(nn.Module):
    """Parts are `encoder`, `projector` and `decoder`. A pipeline stage holds some; what it lacks is None."""

    # Tables, whose rows are looked up or scored one by one: an optimizer of whole matrices does not fit them.
    ADAMW_ONLY = (
        *("decoder.tok_embeddings", "decoder.output"),
        *("encoder.embedding.positions", "encoder.embedding.cells"),
    )
    TOKEN_TABLES = ("decoder.tok_embeddings.weight", "decoder.output.weight")

    def __init__(self, config: VLMConfig, vocab_size: int, backend: str, loss_chunk: int, sources: int = 0):
        """`sources`: of data, for each of which the loss is given too."""
        super().__init__()
        self.config = config
        self.encoder: vit.VisionEncoder | None = vit.VisionEncoder(config.encoder, backend)
        self.projector: Projector | None = Projector(
            config.projector, config.encoder.feature_dim, config.decoder.dim
        )
        self.decoder = decoder.Decoder(config.decoder, vocab_size, backend, loss_chunk, sources)

    def encode(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """uint8 [N, L, C] and int32 [N, L, 3] -> visual tokens [N, L / m^2, D]."""
        assert self.encoder is not None and self.projector is not None
        return self.projector(self.encoder(pixel_values, grid_thw))

    def embed(
        self,
        tokens: Tensor,
        pixel_values: Tensor | None,
        grid_thw: Tensor | None,
        visual_index: Tensor | None,
        visual_taps: Tensor | None = None,
        tap_weights: Tensor | None = None,
    ) -> Tensor:
        """Token embeddings with the visual tokens in their places, [B, S, D]."""
        assert self.decoder.tok_embeddings is not None
        if pixel_values is None or grid_thw is None or visual_index is None:
            return self.decoder.tok_embeddings(tokens)
        visual_NVD = self.encode(pixel_values, grid_thw)
        visual_BVD = visual_table(visual_NVD, tokens.shape[0], self.config.projector.newline)
        h_BSD = self.decoder.tok_embeddings(tokens)
        return place_visual_tokens(h_BSD, visual_BVD, visual_index, visual_taps, tap_weights)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        document_ids: Tensor,
        pixel_values: Tensor | None = None,
        grid_thw: Tensor | None = None,
        visual_index: Tensor | None = None,
        labels: Tensor | None = None,
        per_token: bool = False,
        rows: Tensor | None = None,
        kv_document_ids: Tensor | None = None,
        kv_rows: Tensor | None = None,
        keep: Tensor | None = None,
        source_ids: Tensor | None = None,
        visual_taps: Tensor | None = None,
        tap_weights: Tensor | None = None,
    ) -> Tensor:
        """A batch (experiments/vlm/batch.py) to its summed loss and, with `source_ids`, that of each source,
        float32 [1 + sources]; without labels to logits [B, S, V].

        `per_token`: negative log-likelihood and correctness of each label instead, float32 [B, S, 2]. A later
        pipeline stage gets the residual stream in place of `tokens`, and all but the last return it. `rows`,
        `kv_*`: where each token and each key stands in its slot, if this rank holds only some of the slot's
        tokens (see Mask). While an answer is generated, tokens come without images, and `keep` says whose
        logits are wanted, int64 [B, K].
        """
        images = pixel_values, grid_thw, visual_index, visual_taps, tap_weights
        h_BSD = tokens if self.encoder is None else self.embed(tokens, *images)
        mask = Mask(
            segments=document_ids, causal=True, kv_segments=kv_document_ids, rows=rows, kv_rows=kv_rows
        )
        return self.decoder(h_BSD, positions, mask, labels, per_token, keep, source_ids)

    def tied_names(self) -> dict[str, str]:
        """Parameter -> the name that it is stored under, where two are one."""
        table, output = self.TOKEN_TABLES
        return {output: table} if self.config.decoder.tied_embeddings else {}

    def init_weights(self, seed: int, without: Collection[str] = ()) -> None:
        """Deterministic from `seed`, whatever the sharding; call it once parameters have storage.

        `without`: names of those that get their values elsewhere.
        """
        self.decoder.tie_weights()
        initialise(self, self._initial_weight, seed, without=without)

    def _initial_weight(self, name: str) -> Fill:
        part, _, rest = name.partition(".")
        if is_adapters(name):
            return fan_in() if name.endswith("A.weight") else constant(0.0)
        if part == "decoder":
            return decoder.initial_weight(rest, self.config.decoder)
        if part == "encoder":
            return vit.initial_weight(rest, self.config.encoder)
        return constant(0.0) if rest.endswith("bias") else constant(1.0) if "norm" in rest else fan_in()
