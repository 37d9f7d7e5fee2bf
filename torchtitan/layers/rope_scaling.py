"""Llama 3.1's scaling of rotary frequencies, as data.

Imports no torch, since sizes of models are read without it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Wavelengths above `original_context / low_freq_factor` are stretched by `factor`, those below
    `original_context / high_freq_factor` are left alone, and those between are blended (Llama 3, Dubey et
    al., 2024).
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
