"""Whether Weights & Biases can be written to, asked before anything is built. Imports no torch."""

import contextlib
import io
import os

from torchtitan.config.errors import ConfigError

OFFLINE = "WANDB_MODE=offline keeps the run in the dump folder, for `wandb sync` later"


def require_wandb() -> None:
    """Raises ConfigError where the package is missing or nobody is logged in. Asks no network."""
    try:
        import wandb
    except ImportError:
        raise ConfigError("metrics.enable_wandb needs the package wandb: pip install wandb") from None
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            known = wandb.login(prompt=False, verify=False)
        except TypeError:  # a wandb that cannot but prompt
            known = bool(wandb.api.api_key)
    if not known:
        login = "run `wandb login`, or set WANDB_API_KEY"
        nobody = "metrics.enable_wandb: nobody is logged in to Weights & Biases"
        raise ConfigError(f"{nobody}: {login}; {OFFLINE}")
