"""A linear map in fp8 as its definition says, in float64 and without a dtype of 8 bits.

e4m3 (Micikevicius et al., 2022): three bits of mantissa, normal from 2^-6, largest 448. A scale is the
largest power of two that keeps what it is for within that.
"""

from typing import NamedTuple

import numpy as np

LARGEST, MANTISSA, LEAST_EXPONENT = 448.0, 3, -6


class Products(NamedTuple):
    out: np.ndarray
    grad_input: np.ndarray
    grad_weight: np.ndarray


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest number that e4m3 has, ties to even; what is too large becomes the largest."""
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**LEAST_EXPONENT)))
    step = 2.0 ** (exponent - MANTISSA)
    return np.clip(np.round(x / step) * step, -LARGEST, LARGEST)


def rounded(x: np.ndarray, axis: int | None) -> np.ndarray:
    """What fp8 makes of `x`, with one scale for all that lies along `axis`; None: for all of it."""
    largest = np.max(np.abs(x), axis=axis, keepdims=True)
    scale = 2.0 ** np.floor(np.log2(LARGEST / np.maximum(largest, 1e-12)))
    return to_e4m3(x * scale) / scale


def linear(x: np.ndarray, weight: np.ndarray, grad: np.ndarray, recipe: str) -> Products:
    """x [M, K], weight [N, K], the gradient of their product [M, N]; float64. A scale belongs to what one
    sum of a product runs over.
    """
    out = rounded(x, 1) @ rounded(weight, 1).T
    if recipe == "rowwise":
        return Products(out, rounded(grad, 1) @ rounded(weight, 0), rounded(grad, 0).T @ rounded(x, 0))
    return Products(out, rounded(grad, 1) @ rounded(weight, None), grad.T @ x)
