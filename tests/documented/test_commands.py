"""Every command of the pages does what it says, or at least knows the options that it is given."""

from pathlib import Path

import pytest

from tests.documented.pages import PAGES, REASONS, TRAINING, Block, blocks, hidden
from tests.documented.run import run, run_page

PAGES_HERE = [page for page in PAGES if page.name not in TRAINING]


@pytest.mark.parametrize("page", PAGES_HERE, ids=lambda page: page.name)
def test_the_commands_of_a_page_work(page, prepared, python, tmp_path):
    run_page(page, prepared, python, tmp_path / "torchtitan-vlm")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_of_a_page_is_left_out(page):
    assert hidden(page) == []
    assert {block.reason for block in blocks(page)} <= {"", *REASONS}


@pytest.mark.parametrize(
    "command",
    [
        "torchtitan-vlm generate --no_such_option 3",
        "torchtitan-vlm prepare --input a.tsv --no_such_option 3",
        "./run_train.sh --no_such.option 3",
        "NGPU=2 ./run_train.sh --training.steps three",
        "python scripts/draw_world.py --no_such_option 3",
        "python -m no_such_module",
        "pip install '.[no_such_extra]'",
        "no_such_program",
    ],
)
def test_what_is_only_looked_at_fails_where_it_is_wrong(command, prepared, python):
    assert run(Block(Path(), 0, command, "a GPU"), python, prepared).returncode != 0


def test_commands_that_nobody_would_run_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Do\n\n    torchtitan-vlm inspect\n\n```text\n./run_train.sh\n```\n```bash\n./run_tests.sh\n```\n"
    )
    assert hidden(page) == ["    torchtitan-vlm inspect", "./run_train.sh"]
