"""Chat templates as Hugging Face writes them: Jinja, with `{% generation %}` around what the assistant says.

What a template sees and may use is what transformers gives it (functions, filters, special tokens by name,
white-space rules), but the date is fixed, so that a run's batches do not depend on the day.
"""

import datetime
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from torchtitan.config.errors import ConfigError

# Private-use characters mark what the rendered text alone would not show. Contents never hold them: see
# ChatTemplate.
GENERATION_START, GENERATION_END = "\U000f0000", "\U000f0001"
DATE = datetime.datetime(2024, 7, 26)  # what Llama 3's own templates fall back to
LIKELY_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>")


@dataclass(frozen=True)
class TemplateFile:
    """A chat template as its model publishes it."""

    source: str
    # special tokens; others with a spelling of their own, such as <think>, are text to the tokenizer
    control: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)  # bos_token and the like
    answers_alone: bool = False  # it shows what the assistant says, and only the images of other turns


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: renders its body between two marks."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The block as a call of `_mark` with its body, as jinja2 asks an extension for it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return GENERATION_START + caller() + GENERATION_END


def compile_template(source: str) -> jinja2.Template:
    """Raises jinja2.TemplateError."""
    extensions: list[Any] = [GenerationBlock, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = DATE.strftime
    return environment.from_string(source)


def read_template(path: Path) -> TemplateFile:
    """A .jinja file or a tokenizer_config.json, and the special tokens next to it. Raises ConfigError."""
    try:
        config = _read_next_to(path, "tokenizer_config.json")
        source = _template_of(config, path) if path.suffix == ".json" else path.read_text()
        special = _special_tokens(config, _read_next_to(path, "tokenizer.json"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template = {path}: {error}") from error
    variables = {
        name: text for name, value in config.items() if name.endswith("_token") and (text := _content(value))
    }
    # What looks like a special token and is none to the model's tokenizer becomes text there.
    control = [*special, *variables.values(), *LIKELY_SPECIAL.findall(source)]
    return TemplateFile(source, tuple(dict.fromkeys(control)), variables)


def _read_next_to(path: Path, name: str) -> dict[str, Any]:
    """That file of the template's folder, or the template's own where it bears the settings itself."""
    file = path if path.suffix == ".json" and name == "tokenizer_config.json" else path.with_name(name)
    if not file.is_file():
        return {}
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content


def _template_of(config: dict[str, Any], path: Path) -> str:
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((row["template"] for row in found if row.get("name") == "default"), None)
    if found is None and path.with_name("chat_template.jinja").is_file():
        found = path.with_name("chat_template.jinja").read_text()
    if not isinstance(found, str):
        raise ValueError("it has no chat_template, and there is no chat_template.jinja next to it")
    return found


def _special_tokens(config: dict[str, Any], tokenizer: dict[str, Any]) -> list[str]:
    rows = [*tokenizer.get("added_tokens", []), *config.get("added_tokens_decoder", {}).values()]
    return [row["content"] for row in rows if row.get("content") and row.get("special")]


def _content(value: Any) -> str:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
