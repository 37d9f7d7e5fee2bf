"""Rotary angles against complex numbers, and Llama 3.1's scaling against its three cases written out."""

import math

import torch

from torchtitan.layers.rope import angles, inverse_frequencies, rotate
from torchtitan.layers.rope_scaling import RopeScaling

CPU = torch.device("cpu")


def test_rotation_is_a_product_with_a_unit_complex_number():
    positions = torch.tensor([[0, 1, 7, 300, 5]], dtype=torch.int32)
    x = torch.randn(1, 5, 3, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *angles(positions, 16, 10000.0, None))
    pairs = torch.complex(x[..., :8].double(), x[..., 8:].double())
    frequency = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angle = positions.double()[..., None, None] * frequency
    expected = pairs * torch.polar(torch.ones_like(angle), angle)
    # Float32 knows an angle of 300 to 2e-5.
    assert (turned - torch.cat([expected.real, expected.imag], -1)).abs().max() < 1e-4


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0)).unbind(0)

    def score(a: int, b: int) -> float:
        at = [angles(torch.tensor([[p]]), 32, 10000.0, None) for p in (a, b)]
        return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

    assert abs(score(3, 10) - score(103, 110)) < 1e-4


def test_llama_scaling_stretches_long_waves_and_leaves_short_ones():
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
    plain, scaled = (inverse_frequencies(32, 10000.0, s, CPU).tolist() for s in (None, scaling))
    kinds = set()
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength > 64 / 1.0:
            kinds.add("stretched")
            expected = before / 8
        elif wavelength < 64 / 4.0:
            kinds.add("left alone")
            expected = before
        else:
            kinds.add("blended")
            share = (64 / wavelength - 1.0) / (4.0 - 1.0)
            expected = (1 - share) * before / 8 + share * before
        assert abs(after / expected - 1) < 1e-5
    assert kinds == {"stretched", "blended", "left alone"}


def test_angles_stay_float32_for_bfloat16_inputs():
    """In bfloat16 the positions 256 and 257 would be one."""
    cos, sin = angles(torch.tensor([[256, 257]]), 16, 10000.0, None)
    assert cos.dtype == sin.dtype == torch.float32
    assert rotate(torch.ones(1, 2, 1, 16, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16
    assert not torch.equal(cos[0, 0], cos[0, 1])
