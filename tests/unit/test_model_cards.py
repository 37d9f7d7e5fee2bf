"""docs/models.md says what the published models have, and what the code makes of them."""

import json
import re
from pathlib import Path

import pytest

from experiments.vlm.model.cards import page
from experiments.vlm.model.flavors import ENCODERS, FLAVORS
from torchtitan.models.decoder.flavors import DECODERS

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs/models.md"
# The rows of the tables by name: their cells, as numbers where they are.
ROWS = {
    cells[0]: [int(cell.replace(",", "")) if re.fullmatch(r"[\d,]+", cell) else cell for cell in cells[1:]]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and (cells := [cell.strip() for cell in line.strip("| ").split(" | ")])
}
OF_ENCODER = {
    name: next((REPOSITORY / "tests/published").glob(f"siglip2-{name}-*.json"))
    for name in ENCODERS
    if "-" not in name  # of other families test_towers.py asks transformers
}
OF_DECODER = {
    name: next(
        (REPOSITORY / "tests/published").glob(
            f"{name.replace('llama', 'Llama-').replace('qwen', 'Qwen')}*.json"
        )
    )
    for name in DECODERS
    if name != "debug"
}


@pytest.fixture(autouse=True)
def shipped_flavors_alone(monkeypatch):
    """Other tests add small ones of their own."""
    for name in [name for name in FLAVORS if name.startswith(("small-", "estimated"))]:
        monkeypatch.delitem(FLAVORS, name)


def test_the_page_is_what_its_command_writes():
    assert PAGE.read_text() == page(), "run python scripts/model_cards.py"


@pytest.mark.parametrize("name", OF_DECODER)
def test_decoders_have_the_published_sizes_and_parameters(name):
    published = json.loads(OF_DECODER[name].read_text())
    c, row = published["config"], ROWS[name]
    heads = c["num_attention_heads"]
    assert row[:3] == [c["hidden_size"], c["num_hidden_layers"], heads]
    assert row[3:6] == [
        c["num_key_value_heads"],
        c.get("head_dim") or c["hidden_size"] // heads,
        c["intermediate_size"],
    ]
    assert row[6:9] == [c["vocab_size"], "yes" if c["tie_word_embeddings"] else "no", published["parameters"]]
    assert row[9] == f"{2 * published['parameters'] / 1e9:.3g} GB"


@pytest.mark.parametrize("name", OF_ENCODER)
def test_encoders_have_the_published_sizes_and_parameters(name):
    published = json.loads(OF_ENCODER[name].read_text())
    c, row = published["config"]["vision_config"], ROWS[name]
    assert row[:4] == [
        c[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    ]
    assert row[4:7] == [
        c["patch_size"],
        f"{c['num_patches'] ** 0.5:.0f} x {c['num_patches'] ** 0.5:.0f}",
        published["parameters"],
    ]


def test_a_flavor_is_the_sum_of_its_parts():
    for name in FLAVORS:
        encoder, projector, decoder, total, bf16, trained = ROWS[name]
        parts = [int(part.split(", ", 1)[1].replace(",", "")) for part in (encoder, projector, decoder)]
        assert total == sum(parts), name
        assert float(trained.split()[0]) == pytest.approx(8 * float(bf16.split()[0]), rel=0.01)
        if name != "debugmodel" and FLAVORS[name].family == "lfm2_vl":
            tower = next(tower for tower in ENCODERS if name.startswith(f"{tower}-"))
            language = name.removeprefix(f"{tower}-")
            assert (parts[0], parts[2]) == (ROWS[tower][6], ROWS[language][8])


def test_the_projector_is_a_norm_two_linear_maps_their_biases_and_a_newline_for_tiles():
    for name, config in FLAVORS.items():
        merged, norm = (4, 2) if config.family == "lfm2_vl" else (1, 0)
        width, hidden, dim = merged * config.encoder.dim, config.projector.hidden_dim, config.decoder.dim
        bias = 0 if name == "megatron-mistral-7b" else 1
        by_hand = norm * width + (width + bias) * hidden + (hidden + bias) * dim
        by_hand += dim * (config.resize == "tiles")  # a newline
        assert ROWS[name][1] == f"{hidden}, {by_hand:,}"
