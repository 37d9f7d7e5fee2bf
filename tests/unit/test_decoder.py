"""The decoder against transformers' Llama, Qwen 2 and Qwen 3 at the same random weights, float32."""

import pytest
import torch
import torch.nn.functional as F

from tests.reference.hf_names import DECODER_ROWS, decoder_to_hf
from tests.reference.models import LLAMA, QWEN2, QWEN3, VOCAB, hf_text_config, randomise
from torchtitan.layers import rope
from torchtitan.layers.attention import prepare_mask
from torchtitan.layers.masks import Mask
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.decoder.model import Decoder
from torchtitan.models.weight_names import read

KINDS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}


@pytest.fixture(params=KINDS, name="pair")
def _pair(request) -> tuple[Decoder, torch.nn.Module]:
    """Ours and theirs, the weights taken from theirs."""
    from transformers import AutoModelForCausalLM

    config = KINDS[request.param]
    theirs = AutoModelForCausalLM.from_config(hf_text_config(config)).float().eval()
    randomise(theirs)
    ours = Decoder(config, VOCAB, "sdpa", loss_chunk=16)
    ours.load_state_dict(read(theirs.state_dict(), DECODER_ROWS).named)
    return ours, theirs


def run(
    model: Decoder, tokens: torch.Tensor, document_ids: torch.Tensor, positions: torch.Tensor, labels=None
) -> torch.Tensor:
    return model(model.tok_embeddings(tokens), positions, Mask(document_ids, causal=True), labels)


def one_document(length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    return (
        tokens,
        torch.zeros(batch, length, dtype=torch.int32),
        torch.arange(length, dtype=torch.int32).expand(batch, -1),
    )


def test_logits_and_gradients_equal_transformers(pair):
    ours, theirs = pair
    tokens, documents, positions = one_document(200)
    logits = theirs(tokens).logits
    assert logits.std() > 0.5  # else the comparison would say little
    assert (run(ours, tokens, documents, positions) - logits).abs().max() < 1e-3

    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    our_loss = run(ours, tokens, documents, positions, labels)
    our_loss.sum().backward()
    assert abs(our_loss.item() / loss.item() - 1) < 1e-5
    gradients = decoder_to_hf(
        {name: parameter.grad for name, parameter in ours.state_dict(keep_vars=True).items()}, ours.config
    )
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() < 1e-3 * gradient.abs().max(), name


def test_one_layer_equals_transformers(pair):
    ours, theirs = pair
    h = torch.randn(2, 150, ours.config.dim, generator=torch.Generator().manual_seed(2))
    _, documents, positions = one_document(150)
    config = ours.config
    angles = rope.angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    result = ours.layers["0"](h, *angles, prepare_mask(Mask(documents, causal=True), "sdpa"))
    causal = torch.ones(150, 150, dtype=torch.bool).tril()[None, None]
    expected = theirs.model.layers[0](
        h, position_embeddings=theirs.model.rotary_emb(h, positions.long()), attention_mask=causal
    )
    assert (result - expected).abs().max() < 1e-4


def test_packed_documents_equal_each_document_alone(pair):
    ours, theirs = pair
    lengths, S = [[40, 1, 77, 30], [100, 55]], 160
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (2, S), generator=generator)
    positions = torch.zeros(2, S, dtype=torch.int32)
    documents = torch.full((2, S), -1, dtype=torch.int32)
    spans = []
    for row, row_lengths in enumerate(lengths):
        start = 0
        for document, length in enumerate(row_lengths):
            span = row, slice(start, start + length)
            documents[span], positions[span] = document, torch.arange(length, dtype=torch.int32)
            spans.append(span)
            start += length
    logits = run(ours, tokens, documents, positions)
    for span in spans:
        assert (logits[span] - theirs(tokens[span][None]).logits[0]).abs().max() < 1e-3


def test_dense_and_segment_backends_agree():
    config = DecoderConfig(64, 2, 4, 2, 16, 96, VOCAB, 10000.0, norm_eps=1e-5)
    model = Decoder(config, VOCAB, "sdpa", loss_chunk=16)
    randomise(model)
    tokens, documents, positions = one_document(70)
    documents = documents.clone()
    documents[:, 30:] = 1
    segments = run(model, tokens, documents, positions)
    # A predicate that allows everything makes the backend take the dense mask.
    everything = Mask(documents, causal=True, predicate=lambda b, q, k: (b + q + k) >= 0)
    dense = model(model.tok_embeddings(tokens), positions, everything)
    assert (segments - dense).abs().max() < 1e-5
