"""The whole model: against transformers' Lfm2VlForConditionalGeneration, and what must not see what."""

import pytest
import torch
import torch.nn.functional as F

from experiments.vlm.model.config import ProjectorConfig
from experiments.vlm.model.vlm import VLM, Projector, place_visual_tokens
from tests.reference.batches import (
    IMAGE_ID,
    Document,
    Picture,
    Sizes,
    build_batch,
    example_slots,
    pad_for_transformers,
    words,
)
from tests.reference.hf_names import VLM_ROWS, vlm_to_hf
from tests.reference.models import (
    LLAMA,
    QWEN2,
    hf_text_config,
    hf_vision_config,
    randomise,
    require_gradients_of,
    small_vlm,
)
from torchtitan.layers.masks import Mask
from torchtitan.models.decoder.flavors import DecoderConfig
from torchtitan.models.weight_names import read


def sizes_of(merge: int, patch_rows: int = 1) -> Sizes:
    return Sizes(seq_len=56, patches_per_row=20 * merge**2, patch_rows=patch_rows, merge=merge)


def transformers_model(config: DecoderConfig, merge: int, ours: VLM) -> torch.nn.Module:
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    theirs = Lfm2VlForConditionalGeneration(
        Lfm2VlConfig(
            vision_config=hf_vision_config(ours.config.encoder),
            text_config=hf_text_config(config),
            image_token_id=IMAGE_ID,
            projector_hidden_size=ours.config.projector.hidden_dim,
            downsample_factor=merge,
            tie_word_embeddings=config.tied_embeddings,
        )
    )
    lacking = theirs.load_state_dict(vlm_to_hf(ours.state_dict(), ours.config), strict=False)
    theirs.tie_weights()
    assert not lacking.unexpected_keys and set(lacking.missing_keys) <= {"lm_head.weight"}
    return theirs.float().eval()


def inputs_alone(document: Document, merge: int) -> dict[str, torch.Tensor]:
    """One document as transformers takes it."""
    alone = build_batch([[document]], Sizes(seq_len=40, patches_per_row=40 * merge**2, merge=merge))
    length = int((alone["document_ids"] >= 0).sum())
    pictures = [part for part in document if isinstance(part, Picture)]
    return {"input_ids": alone["tokens"][:, :length]} | (pad_for_transformers(pictures) if pictures else {})


@pytest.mark.parametrize(("config", "merge"), [(LLAMA, 1), (LLAMA, 2), (QWEN2, 2), (LLAMA, 3)])
def test_packed_logits_and_gradients_equal_transformers_on_each_document(config, merge):
    ours = small_vlm(config, merge)
    theirs = transformers_model(config, merge, ours)
    slots = example_slots(merge)
    batch = build_batch(slots, sizes_of(merge))
    labels = batch.pop("labels")
    logits = ours(**batch)
    loss, expected_loss = ours(**batch, labels=labels), torch.zeros(())
    for row, documents in enumerate(slots):
        for number, document in enumerate(documents):
            here = batch["document_ids"][row] == number
            expected = theirs(**inputs_alone(document, merge)).logits[0]
            assert (logits[row, here] - expected).abs().max() < 1e-3
            expected_loss = expected_loss + F.cross_entropy(expected, labels[row, here], reduction="sum")
    assert abs(loss.item() / expected_loss.item() - 1) < 1e-5
    loss.sum().backward()
    expected_loss.backward()
    gradients = vlm_to_hf(
        {name: parameter.grad for name, parameter in ours.state_dict(keep_vars=True).items()}, ours.config
    )
    require_gradients_of(theirs, gradients)


@pytest.mark.parametrize("config", [LLAMA, QWEN2])
def test_weights_come_back_from_transformers_as_they_went(config):
    ours = small_vlm(config)
    theirs = transformers_model(config, 2, ours)
    back = read(theirs.state_dict(), VLM_ROWS)
    assert not back.unused and back.named.keys() == ours.state_dict().keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, back.named[name]), name


def test_changing_one_image_changes_no_other_document():
    model, batch = small_vlm(), build_batch(example_slots(2), sizes_of(2))
    del batch["labels"]
    before = model(**batch)
    batch["pixel_values"] = batch["pixel_values"].clone()
    # the first image of the first document
    batch["pixel_values"][0, :24] = 255 - batch["pixel_values"][0, :24]
    after = model(**batch)
    touched = torch.zeros_like(batch["document_ids"], dtype=torch.bool)
    # from the image on; what comes before is causal
    touched[0] = (batch["document_ids"][0] == 0) & (torch.arange(56) >= 5)
    assert torch.equal(before[~touched], after[~touched])
    assert (before[touched] != after[touched]).any(-1).all()


def test_changing_one_document_changes_no_other():
    model, batch = small_vlm(), build_batch(example_slots(2), sizes_of(2))
    del batch["labels"]
    before = model(**batch)
    batch["tokens"] = batch["tokens"].clone()
    document = (batch["document_ids"] == 1) & torch.tensor([[True], [False]])
    batch["tokens"][document] = torch.tensor(words(9, 50))
    after = model(**batch)
    assert torch.equal(before[~document], after[~document])
    assert not torch.equal(before[document], after[document])


@pytest.mark.parametrize("patch_rows", [2, 3])
def test_rows_of_patches_hold_images_of_their_slot_wherever_they_stand(patch_rows):
    """The same documents with their images spread over several rows: the same logits."""
    model = small_vlm()
    one = build_batch(example_slots(2), sizes_of(2))
    several = build_batch(example_slots(2), sizes_of(2, patch_rows))
    short = Sizes(seq_len=56, patches_per_row=44, patch_rows=patch_rows)
    spread = build_batch(example_slots(2), short)
    assert (spread["grid_thw"].view(2, patch_rows, -1, 3)[0, 1] >= 0).any()
    logits = [
        model(**{key: value for key, value in batch.items() if key != "labels"})
        for batch in (one, several, spread)
    ]
    real = one["document_ids"] >= 0
    for other in logits[1:]:
        assert (logits[0] - other)[real].abs().max() < 1e-5


def test_a_batch_of_text_alone_equals_the_decoder_alone():
    model = small_vlm()
    batch = build_batch([[[words(30, 0)], [words(20, 1)]], [[words(50, 2)]]], sizes_of(2))
    labels = batch.pop("labels")
    embeddings = model.decoder.tok_embeddings(batch["tokens"])
    expected = model.decoder(embeddings, batch["positions"], Mask(batch["document_ids"], causal=True), labels)
    loss = model(**batch, labels=labels)
    assert torch.equal(loss, expected)
    loss.sum().backward()
    for part in (model.encoder, model.projector):
        for name, parameter in part.named_parameters():
            # Present and zero: a rank without images still takes part in every collective.
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_scores_of_tokens_add_up_to_the_loss():
    model, batch = small_vlm(), build_batch(example_slots(2), sizes_of(2))
    labels = batch.pop("labels")
    logits = model(**batch)
    loss = model(**batch, labels=labels)
    scores = model(**batch, labels=labels, per_token=True)
    valid = labels >= 0
    assert scores.shape == (2, 56, 2) and not scores[~valid].any()
    assert abs(scores[..., 0].sum() / loss - 1) < 1e-6
    assert torch.equal(scores[..., 1] == 1, (logits.argmax(-1) == labels) & valid)


def test_placing_reads_each_visual_token_once_and_leaves_text():
    h, visual = torch.randn(2, 9, 4), torch.randn(2, 6, 4)
    index = torch.tensor([[-1, 0, 1, -1, -1, 5, 4, -1, -1], [-1] * 9])
    placed = place_visual_tokens(h, visual, index)
    for b in range(2):
        for s in range(9):
            expected = h[b, s] if index[b, s] < 0 else visual[b, index[b, s]]
            assert torch.equal(placed[b, s], expected)


def test_what_is_in_visual_rows_that_nobody_reads_does_not_spread():
    h, index = torch.randn(1, 9, 4, requires_grad=True), torch.tensor([[-1, 2, -1, -1, 3, -1, -1, -1, -1]])
    visual = torch.full((1, 6, 4), float("nan"))
    visual[0, 2:4] = 1.0
    visual.requires_grad_()
    placed = place_visual_tokens(h, visual, index)
    placed.sum().backward()
    assert placed.isfinite().all()
    assert torch.equal(visual.grad, torch.tensor([0.0, 0, 1, 1, 0, 0])[None, :, None].expand(1, 6, 4))
    assert torch.equal(h.grad[..., 0], (index < 0).float())


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("norm", ["none", "before merging", "after merging"])
@pytest.mark.parametrize(("linears", "bias"), [(1, True), (2, False), (3, True)])
def test_a_projector_is_what_its_switches_say(merge, norm, linears, bias):
    """Written out for one visual token."""
    config = ProjectorConfig(
        7, norm != "none", merge, norm == "before merging", 0.1, linears, "gelu_pytorch_tanh", bias
    )
    projector, patches = Projector(config, 6, 5), torch.randn(1, 3 * merge**2, 6)
    randomise(projector)
    weights = dict(projector.named_parameters())
    x = patches[0, merge**2 : 2 * merge**2]
    if norm == "before merging":
        x = F.layer_norm(x, (6,), weights["norm.weight"], weights["norm.bias"], 0.1)
    x = x.flatten()
    if norm == "after merging":
        x = F.layer_norm(x, x.shape, weights["norm.weight"], weights["norm.bias"], 0.1)
    for number in range(1, linears + 1):
        x = F.gelu(x, approximate="tanh") if number > 1 else x
        x = weights[f"linear_{number}.weight"] @ x + weights.get(f"linear_{number}.bias", 0.0)
    assert x.shape == (5,) and (projector(patches)[0, 1] - x).abs().max() < 1e-5
    assert len(weights) == 2 * (norm != "none") + linears * (1 + bias)
