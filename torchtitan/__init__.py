"""The trainer. It knows nothing of images: what it trains comes from a TrainSpec (spec.py).

train         the loop over steps; evaluator: what a run is judged by
build         a job becomes the parts of a run; dry_run: only looked at
loaded_model  a model with its weights, for training, conversion and generation
launch        the ranks of a run on one machine
"""

__version__ = "0.1.0"  # pyproject.toml reads it here
