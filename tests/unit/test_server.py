"""The server answers what the engine answers, and goes on whatever is sent to it."""

import base64
import contextlib
import errno
import http.client
import json
import os
import resource
import socket
import threading
import time

import pytest

from experiments.vlm.generate.answering import Answering
from experiments.vlm.generate.server import DECODED_AT_A_TIME, RequestLimits, Server
from experiments.vlm.generate.service import Service
from tests.unit.test_generate import PLAN, engine, picture, prompter
from torchtitan.generation.engine import Request


@pytest.fixture(scope="module")
def server():
    service = Service(Answering(engine(3, reuse=True), prompter(), None))
    running = Server(("127.0.0.1", 0), service, "tiny", RequestLimits(1 << 18, 8))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def post(server, body, path="/v1/chat/completions", **headers):
    """(status, body of the answer)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, text


def item(picture, **more) -> dict:
    url = "data:image/png;base64," + base64.b64encode(picture.data).decode()
    return {"type": "image_url", "image_url": {"url": url, **more}}


def expected(turns) -> str:
    request = Request(0, prompter().conversation(turns), max_tokens=8)
    return "".join(event.text for event in engine(1).answer([request]))


def good(server) -> None:
    asked = {"messages": [{"role": "user", "content": "Who?"}], "temperature": 0}
    status, text = post(server, asked)
    said = json.loads(text)["choices"][0]["message"]["content"]
    assert status == 200 and said == expected([("user", ["Who?"])])


def test_a_client_holds_a_conversation_with_two_pictures(server):
    first, second = picture(10, 24), picture(24, 10, 1)
    messages = [{"role": "user", "content": [item(first), {"type": "text", "text": "First?"}]}]
    turns = [("user", [first, "First?"])]
    for question in ([item(second), {"type": "text", "text": "Second?"}], "Third?"):
        status, text = post(server, {"messages": messages, "temperature": 0, "logprobs": True})
        answer = json.loads(text)
        said = answer["choices"][0]["message"]["content"]
        assert status == 200 and said == expected(turns)
        assert answer["usage"]["completion_tokens"] == len(answer["choices"][0]["logprobs"]["content"])
        messages += [{"role": "assistant", "content": said or " "}, {"role": "user", "content": question}]
        asked = [second, "Second?"] if isinstance(question, list) else ["Third?"]
        turns += [("assistant", [said or " "]), ("user", asked)]


def test_a_stream_is_the_same_text_in_pieces(server):
    asked = {"messages": [{"role": "user", "content": "Who?"}], "temperature": 0, "stream": True}
    status, text = post(server, asked)
    lines = [line.removeprefix("data: ") for line in text.decode().split("\n\n") if line]
    pieces = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert status == 200 and lines[-1] == "[DONE]" and pieces[-1]["finish_reason"] in ("stop", "length")
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == expected([("user", ["Who?"])])


def test_a_stream_may_tell_tokens_and_their_logprobs(server):
    asked = {"messages": [{"role": "user", "content": "Who?"}], "temperature": 0, "logprobs": True}
    whole = json.loads(post(server, asked)[1])
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    lines = [line.removeprefix("data: ") for line in post(server, asked)[1].decode().split("\n\n") if line]
    *pieces, last = map(json.loads, lines[:-1])
    told = [one for piece in pieces for one in piece["choices"][0]["logprobs"]["content"]]
    assert told == whole["choices"][0]["logprobs"]["content"] and pieces[0]["choices"][0]["delta"]["role"]
    assert last["choices"] == [] and last["usage"] == whole["usage"]


def test_fields_that_ask_for_nothing_change_nothing(server):
    nothing = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "n": 1, "presence_penalty": 0, "logit_bias": {},
        "frequency_penalty": 0.0, "top_logprobs": None, "tools": [], "tool_choice": "auto", "seed": None,
        "response_format": {"type": "text"}, "top_p": 0, "stream_options": None, "parallel_tool_calls": True,
    }  # fmt: skip
    status, text = post(server, user("Who?") | {"temperature": 0} | nothing)
    said = json.loads(text)["choices"][0]["message"]["content"]
    assert status == 200 and said == expected([("user", ["Who?"])])


def test_a_model_without_a_chat_template_says_that_it_takes_one_turn():
    service = Service(Answering(engine(1), prompter(template=None), None))
    running = Server(("127.0.0.1", 0), service, "tiny", RequestLimits(1 << 18, 8))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", running.server_port)
    connection.request("GET", "/v1/models")
    assert json.loads(connection.getresponse().read())["data"][0]["conversations"] is False
    two = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    status, text = post(running, {"messages": two})
    assert status == 400 and "answers one turn at a time" in json.loads(text)["error"]["message"]
    assert post(running, {"messages": two[:1]})[0] == 200
    running.shutdown()
    service.close()


def user(content) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 200_000, 400, "not JSON"),
        (b'{"messages": NaN}', 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"9" * 10_000, 400, "not JSON"),
        ([], 400, "not an object"),
        ({}, 400, "messages: must be a list"),
        ({"messages": [7]}, 400, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, 400, "messages[0].role"),
        (user({"a": 1}), 400, "messages[0].content"),
        (user([{"type": "file"}]), 400, "must be an item of type text or image_url"),
        (user([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]), 400, "must be a data URL"),
        (user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]), 400, "a data URL"),
        (user([{"type": "image_url", "image_url": "data:image/png;base64,???"}]), 400, "is not base64"),
        (user([{"type": "image_url", "image_url": "data:image/png;base64,é"}]), 400, "is not base64"),
        (user([{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]), 400, "content[0]: Pillow"),
        (
            user([{"type": "text", "text": "a", "cache_control": {"type": "b"}}]),
            400,
            "[0].cache_control: this",
        ),
        (user([{"type": "text", "text": 1}]), 400, "content[0].text: must be a text"),
        (user([item(picture(9, 9), detail="low")]), 400, "detail: must be high or auto"),
        (user([item(picture(9, 9), size=3)]), 400, "content[0].image_url.size: this server knows no"),
        (user("long " * 300), 400, "the prompt has"),
        (user("a") | {"temperature": "hot"}, 400, "temperature: must be a number"),
        (user("a") | {"temperature": 10**400}, 400, "temperature: must be a number"),
        (user("a") | {"max_tokens": 0}, 400, "max_tokens: must be a whole number from 1"),
        (user("a") | {"n": 2}, 400, "n: must be 1 here, or left out"),
        (user("a") | {"frequency_penalty": 0.5}, 400, "frequency_penalty: must be 0 here, or left out"),
        (user("a") | {"logit_bias": {"5": 9}}, 400, "logit_bias: must be {} here"),
        (user("a") | {"tools": [{"type": "function"}]}, 400, "tools: must be [] here"),
        (user("a") | {"response_format": {"type": "json_object"}}, 400, 'must be {"type": "text"} here'),
        (user("a") | {"stream_options": {"usage": True}}, 400, "stream_options: must be an object with"),
        (user("a") | {"stop": [1]}, 400, "stop: must be"),
        (user("a") | {"stop": False}, 400, "stop: must be"),
        (
            user("a") | {"seed": 1 << 63},
            400,
            f"seed: must be a whole number from {-(1 << 63)}",
        ),
        ({"messages": [user("a")["messages"][0] | {"tool_calls": [1]}]}, 400, "messages[0].tool_calls: this"),
        (user("a") | {"best_of": 1}, 400, "best_of: this server knows no such field"),
        (b"x" * (1 << 20), 413, "may have 0.25 MB"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_one_error_and_the_server_goes_on(server, body, status, told):
    found, text = post(server, body)
    assert found == status and told in json.loads(text)["error"]["message"]
    good(server)


def test_a_loopback_address_of_the_newer_kind_is_served_too():
    with socket.socket(socket.AF_INET6) as there:
        if there.connect_ex(("::1", 9)) == errno.EADDRNOTAVAIL:
            pytest.skip("this machine has no ::1")
    service = Service(Answering(engine(1), prompter(), None))
    running = Server(("::1", 0), service, "tiny", RequestLimits(1 << 18, 8))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("::1", running.server_port)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    running.shutdown()
    service.close()


def test_other_sites_cannot_send_a_browser_here(server):
    assert post(server, user("a"), Host="evil.example")[0] == 403
    assert post(server, user("a"), **{"Content-Type": "text/plain"})[0] == 403
    assert post(server, b"", "/elsewhere")[0] == 404


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"PUT /v1/models HTTP/1.1\r\n\r\n", 501),
        (b"\x16\x03\x01\r\n", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
         b"Content-Type: Application/JSON\r\nContent-Length: 9\r\n\r\n{}", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
         b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    ],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_what_is_no_request_is_one_error_too(server, sent, status):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        head, _, body = b"".join(iter(lambda: connection.recv(1 << 16), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 %d " % status) and json.loads(body)["error"]["message"]


def test_who_asks_is_told_where_the_program_fails(server, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(server.service.engine, "forward", fails)
    for stream in (False, True):
        status, text = post(server, user("Fail?") | {"stream": stream})
        assert status == (200 if stream else 500)
        assert json.loads(text.decode().removeprefix("data: "))["error"]["message"] == "the model failed"
    monkeypatch.setattr(server.service.prompter, "prompt", fails)
    status, text = post(server, user("Fail?"))
    assert status == 500 and "the server failed" in json.loads(text)["error"]["message"]
    monkeypatch.undo()
    good(server)


def test_more_open_files_than_select_takes_stop_nothing(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this machine does not allow so many")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    with contextlib.ExitStack() as files:
        for _ in range(1024):
            files.enter_context(open(os.devnull))
        good(server)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_few_requests_have_their_images_decoded_at_a_time(server, monkeypatch):
    here, most, lock, make = 0, 0, threading.Lock(), server.service.prompter.prompt

    asked = user([item(picture(8, 8)), {"type": "text", "text": "Who?"}])

    def prompt(turns):
        nonlocal here, most
        with lock:
            here += 1
            most = max(most, here)
        made = make(turns)
        time.sleep(0.02)
        with lock:
            here -= 1
        return made

    monkeypatch.setattr(server.service.prompter, "prompt", prompt)
    threads = [threading.Thread(target=post, args=(server, asked)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= DECODED_AT_A_TIME


def test_connections_that_are_closed_or_silent_stop_nothing(server):
    for sent in (b"", b"POST /v1/chat", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            connection.sendall(sent)
    body = json.dumps(user("a") | {"stream": True, "temperature": 1}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: "
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            connection.sendall(head + str(len(body)).encode() + b"\r\n\r\n" + body)
    good(server)


def test_many_ask_at_the_same_time(server):
    found, turns = {}, {number: [("user", [f"Question {number}?"])] for number in range(6)}

    def ask(number: int) -> None:
        asked = {"messages": [{"role": "user", "content": f"Question {number}?"}], "temperature": 0}
        found[number] = json.loads(post(server, asked)[1])["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in turns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: expected(asked) for number, asked in turns.items()}


def test_the_page_is_there_and_asks_for_the_grid_of_a_picture(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", "/")
    page = connection.getresponse().read().decode()
    assert "/v1/chat/completions" in page and "http" + "://" not in page and "https" + "://" not in page
    status, text = post(server, picture(16, 40).data, "/grid")
    h, w = PLAN.grid(16, 40)
    assert status == 200 and json.loads(text) == {"h": h, "w": w, "tokens": h * w // 4, "merge": 2}
    assert post(server, b"no image", "/grid")[0] == 400
