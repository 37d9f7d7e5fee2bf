"""A conversation through a pipe: what it says is what the engine says of the whole conversation."""

import io
import json
import os
import signal
from types import SimpleNamespace

import pytest

from experiments.commands.chat import converse
from experiments.vlm.generate.answering import Answering
from experiments.vlm.generate.chat import Chat
from tests.unit.test_generate import engine, picture, prompter
from torchtitan.config.errors import UserError
from torchtitan.generation.engine import Request


def chat(**options) -> Chat:
    answering = Answering(engine(1, reuse=True), prompter(**options), None)
    return Chat(answering, lambda number, prompt: Request(number, prompt, max_tokens=6))


def expected(turns) -> str:
    request = Request(0, prompter().conversation(turns), max_tokens=6)
    return "".join(event.text for event in engine(1).answer([request]))


def test_turns_pictures_undo_and_what_is_wrong(tmp_path, monkeypatch, capsys):
    first, second = picture(9, 20), picture(20, 9, 1)
    for name, image in (("a.png", first), ("b.png", second)):
        (tmp_path / name).write_bytes(image.data)
    (tmp_path / "no.png").write_bytes(b"none")
    lines = [
        f"/image {tmp_path}/a.png", f"/image {tmp_path}/b.png", "Which?", "/image nowhere.png",
        f"/image {tmp_path}/no.png", "Forget this.", "/undo", "And now?", f"/save {tmp_path}/said.json",
        "/help", "/quit", "never read",
    ]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    talk = chat()
    converse(talk)
    out, err = capsys.readouterr()
    turns = [("user", [first, second, "Which?"])]
    one = expected(turns)
    turns += [("assistant", [one]), ("user", ["And now?"])]
    assert out.startswith(one + "\n") and out.endswith(expected(turns) + "\n")
    assert "error: /image nowhere.png: No such file" in err and "no.png: Pillow does not open" in err
    saved = json.loads((tmp_path / "said.json").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"] * 2
    assert saved[0]["content"][0] == {"type": "image", "image": f"{tmp_path}/a.png"}


def test_a_turn_that_cannot_be_asked_leaves_the_conversation_as_it_was(monkeypatch, capsys):
    talk = chat()
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 200 + "\nWho?\n"))
    converse(talk)
    out, err = capsys.readouterr()
    assert "error: the prompt has" in err and len(talk.turns) == 2
    assert out == expected([("user", ["Who?"])]) + "\n"


def test_undo_takes_waiting_pictures_back_first_and_a_wrong_command_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.png").write_bytes(picture(9, 20).data)
    lines = ["Who?", f"/image {tmp_path}/a.png", "/undo", "/imag a.png", "/save", "Who?", "/undo"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    talk = chat()
    converse(talk)
    err = capsys.readouterr().err
    assert talk.turns[0] == ("user", ["Who?"]) and len(talk.turns) == 2 and not talk.pictures
    assert "/imag: no such command" in err and "error: /save: give a path" in err


@pytest.mark.parametrize("path", ["~nobody-is-called-so/a.png", "a\0b"])
def test_a_path_that_cannot_be_is_told_and_the_conversation_goes_on(path):
    for command in ("/image", "/save"):
        with pytest.raises(UserError, match=f"{command} {path}: (No such file|embedded null)"):
            chat().command(f"{command} {path}")


def test_no_picture_is_read_from_a_device_and_no_file_but_a_conversation_is_written_over(tmp_path):
    talk = chat()
    for path in ("/dev/zero", tmp_path):
        with pytest.raises(UserError, match=f"/image {path}: is no file"):
            talk.command(f"/image {path}")
    (tmp_path / "a.png").write_bytes(picture(9, 20).data)
    with pytest.raises(UserError, match="a.png: is a file that is no conversation"):
        talk.command(f"/save {tmp_path}/a.png")
    assert (tmp_path / "a.png").read_bytes() == picture(9, 20).data
    for turns in ([], [("user", ["Who?"]), ("assistant", ["."])]):
        talk.turns = turns
        assert talk.command(f"/save {tmp_path}/said.json").startswith(f"{len(turns)} messages")


def test_what_was_typed_in_another_encoding_can_be_saved(tmp_path):
    talk = chat()
    talk.turns = [("user", ["caf\udce9, 日本"]), ("assistant", ["."])]
    talk.command(f"/save {tmp_path}/said.json")
    saved = json.loads((tmp_path / "said.json").read_bytes())
    assert saved["messages"][0]["content"] == [{"type": "text", "text": "caf\udce9, 日本"}]


def test_a_model_that_knows_no_conversations_is_asked_each_turn_alone(monkeypatch, capsys):
    talk = chat(template=None)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\nWho?\n"))
    converse(talk)
    said = capsys.readouterr().out
    assert said[: len(said) // 2] * 2 == said and len(talk.turns) == 4


def test_an_interrupt_at_the_prompt_loses_no_conversation(monkeypatch, capsys):
    lines = iter(["Who?\n", KeyboardInterrupt(), "/undo\n", ""])

    def readline() -> str:
        line = next(lines)
        if isinstance(line, KeyboardInterrupt):
            raise line
        return line

    monkeypatch.setattr("sys.stdin", SimpleNamespace(readline=readline))
    converse(chat())
    assert "/quit or Ctrl-D leaves\n> turns that are left: 0" in capsys.readouterr().err


def test_an_interrupt_ends_an_answer_and_keeps_what_was_said():
    before, talk = signal.getsignal(signal.SIGINT), chat()
    pieces = talk.say("Who?")
    next(pieces)
    os.kill(os.getpid(), signal.SIGINT)
    assert len(list(pieces)) <= 2 and len(talk.turns) == 2  # of five that were to come
    assert signal.getsignal(signal.SIGINT) is before
