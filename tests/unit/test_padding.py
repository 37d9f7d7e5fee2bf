"""Padding carries no loss and no gradient, whatever stands in it."""

import pytest
import torch

from tests.reference.batches import Sizes, build_batch, example_slots, words
from tests.reference.models import loss_and_gradients, small_vlm

TIGHT = Sizes(seq_len=56, patches_per_row=80)
ROOMY = {
    "longer slots": Sizes(seq_len=71, patches_per_row=80),
    "longer rows": Sizes(seq_len=56, patches_per_row=148),
    "more rows": Sizes(seq_len=56, patches_per_row=80, patch_rows=3),
    "all": Sizes(seq_len=130, patches_per_row=132, patch_rows=2),
}


@pytest.mark.parametrize("more", ROOMY)
def test_more_padding_gives_the_same_loss_and_gradients(more):
    model = small_vlm()
    loss, gradients = loss_and_gradients(model, build_batch(example_slots(2), TIGHT))
    roomy_loss, roomy_gradients = loss_and_gradients(model, build_batch(example_slots(2), ROOMY[more]))
    assert abs(roomy_loss / loss - 1) < 1e-6
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # Relative to the largest gradient of the model: sums are taken in another order.
        assert (gradient - roomy_gradients[name]).abs().max() < 1e-6 * largest, name


def test_an_empty_slot_adds_nothing():
    model = small_vlm()
    loss, gradients = loss_and_gradients(model, build_batch(example_slots(2), TIGHT))
    more_loss, more_gradients = loss_and_gradients(model, build_batch([*example_slots(2), []], TIGHT))
    assert abs(more_loss / loss - 1) < 1e-6
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - more_gradients[name]).abs().max() < 1e-6 * largest, name


def test_a_batch_of_nothing_gives_zero_loss_and_zero_gradients():
    loss, gradients = loss_and_gradients(small_vlm(), build_batch([[], []], TIGHT))
    assert loss.item() == 0
    for name, gradient in gradients.items():
        assert not gradient.any(), name


@pytest.mark.parametrize("field", ["pixel_values", "tokens", "positions"])
def test_garbage_in_padding_changes_nothing_at_all(field):
    model, batch = small_vlm(), build_batch(example_slots(2), TIGHT)
    loss, gradients = loss_and_gradients(model, batch)
    padding = batch["grid_thw"][..., 0] < 0 if field == "pixel_values" else batch["document_ids"] < 0
    batch[field] = batch[field].clone()
    batch[field][padding] = 77
    garbage_loss, garbage_gradients = loss_and_gradients(model, batch)
    assert torch.equal(loss, garbage_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, garbage_gradients[name]), name


def test_the_gradient_with_respect_to_padding_is_exactly_zero():
    model, batch = small_vlm(), build_batch(example_slots(2), TIGHT)
    seen = {}

    def keep(name):
        def hook(module, inputs, output):
            output.retain_grad()
            seen[name] = output

        return hook

    for name in (
        "encoder.embedding",
        "encoder.layers.0",
        "encoder.layers.1",
        "decoder.layers.0",
        "decoder.tok_embeddings",
    ):
        model.get_submodule(name).register_forward_hook(keep(name))
    model(**batch).sum().backward()
    for name, output in seen.items():
        padding = batch["grid_thw"][..., 0] < 0 if name.startswith("encoder") else batch["document_ids"] < 0
        assert not output.grad[padding].any(), name
        assert output.grad[~padding].any(), name


def test_nothing_is_nan_where_rows_hold_nothing_but_padding():
    model, batch = small_vlm(), build_batch([[[words(20, 0)]], []], TIGHT)
    del batch["labels"]
    assert model(**batch).isfinite().all()
