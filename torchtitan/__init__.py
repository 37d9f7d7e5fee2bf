"""The trainer. It knows nothing of images: what it trains comes from a TrainSpec (spec.py)."""

__version__ = "0.1.0"  # pyproject.toml reads it here
