"""Weights and tokenizers from the Hugging Face hub, with the hub's own library. Imports no torch."""

from pathlib import Path
from typing import Literal

from torchtitan.config.errors import UserError
from torchtitan.tools.disk import describe, is_full, require_writable

What = Literal["tokenizer", "weights", "all"]
TOKENIZERS = ["tokenizer.json", "tokenizer.model", "original/tokenizer.model"]
FILES = {
    "tokenizer": [
        *(*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "special_tokens.json"),
        "chat_template.jinja",
    ],
    "weights": ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"],
}
TWICE = ["consolidated*.safetensors"]  # the same weights again, under other names
# what a model's name begins with -> who keeps it
OWNERS = {
    "Llama-": "meta-llama",
    "Mistral-": "mistralai",
    "Qwen": "Qwen",
    "siglip": "google",
    "clip-vit-": "openai",
    "aimv2-": "apple",
    "dinov3-": "facebook",
}
SCRIPT = Path(__file__).parents[2] / "scripts" / "download_hf_assets.py"  # in a checkout, not in a wheel


def command_for(path: Path) -> str:
    """What downloads the tokenizer or the weights that should be at `path`, as far as its name says."""
    folder = path.parent if path.suffix in (".json", ".model", ".safetensors") else path
    owner = owner_of(folder.name)
    repo = f"{owner}/{folder.name}" if owner else "OWNER/NAME"
    command = "python scripts/download_hf_assets.py" if SCRIPT.is_file() else "torchtitan-vlm download"
    return f"{command} {repo} --out {folder}"


def get_it(path: Path) -> str:
    """The end of a message that says that `path` is missing."""
    return f"get it with `{command_for(path)}`"


def owner_of(name: str) -> str | None:
    """Who keeps the model of that name, where it is known."""
    return next((owner for start, owner in OWNERS.items() if name.startswith(start)), None)


def repository(name: str) -> str:
    """OWNER/NAME of a name that may lack its owner. Raises UserError where nobody knows the owner."""
    if "/" in name:
        return name
    owner = owner_of(name)
    if owner is None:
        raise UserError(f"{name}: whose model is it? give OWNER/NAME, such as meta-llama/Llama-3.2-1B")
    return f"{owner}/{name}"


def download(repo: str, what: What, folder: Path, token: str = "", revision: str = "main") -> list[Path]:
    """The files of `repo` that `what` names, into `folder`; what is there and whole is not fetched again.

    Returns what is there then. Raises UserError: not found, gated, not reachable, no room, or not in there.
    """
    require_writable(folder, "--out")
    wanted = [name for part, names in FILES.items() if what in (part, "all") for name in names]
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError("downloads need the package huggingface_hub: pip install huggingface_hub") from None
    try:
        snapshot_download(
            repo,
            revision=revision,
            local_dir=folder,
            allow_patterns=wanted,
            ignore_patterns=TWICE,
            token=token or None,
        )
    except (OSError, ValueError) as error:
        raise UserError(reason(error, repo, revision, folder)) from None
    found = sorted({path for pattern in wanted for path in folder.glob(pattern) if path.is_file()})
    check_whole(found, repo, what, folder)
    return found


def check_whole(found: list[Path], repo: str, what: What, folder: Path) -> None:
    """Raises UserError where the repository lacks what was asked of it."""
    names = {str(path.relative_to(folder)) for path in found}
    if what == "tokenizer" and not names & set(TOKENIZERS):
        raise UserError(
            f"{repo} has no {' or '.join(TOKENIZERS[:2])}; name a repository that has the tokenizer"
        )
    if what != "tokenizer" and not any(name.endswith(".safetensors") for name in names):
        other = "; `--what tokenizer` fetches its tokenizer alone" if names & set(TOKENIZERS) else ""
        raise UserError(f"{repo} has no .safetensors: name a repository that has the weights so{other}")


def reason(error: OSError | ValueError, repo: str, revision: str, folder: Path) -> str:
    """The line for what the hub's library raised. All of it are OSErrors or ValueErrors."""
    from huggingface_hub import errors

    page, access = f"https://huggingface.co/{repo}", "--token, HF_TOKEN or `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {page}, then say who you are with {access}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{repo} is not on the hub, or private: check the name at {page}; a private one needs {access}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}: see {page}"
    if isinstance(error, errors.HFValidationError):
        return f"{repo}: expected OWNER/NAME, such as meta-llama/Llama-3.2-1B"
    if is_full(error):
        return f"{folder}: {describe(error, folder)}; make room, and the same command goes on"  # type: ignore[arg-type]
    detail = " ".join(str(error).split())[:200]
    if isinstance(error, errors.HfHubHTTPError):
        return f"{repo}: the hub answers: {detail}"
    unreached = f"{repo}: the hub cannot be reached ({type(error).__name__}: {detail})"
    return f"{unreached}; try again, or copy the files to {folder}"
