"""The server over real sockets: streams, the queue, clients that leave, and all that is refused."""

import concurrent.futures
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

httpx = pytest.importorskip("httpx", reason="the tests of the server need httpx")
HERE = pathlib.Path(__file__).parent


def post(url, **request):
    return httpx.post(f"{url}/api/generate", json=request, timeout=30)


def events(response):
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def refused(response, status):
    """The message of a refusal."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    return body["error"]


def raw(url, text, patience=10.0):
    """What the server sends back to these bytes."""
    place = urllib.parse.urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=patience) as connection:
        connection.sendall(text)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer.decode()


@pytest.fixture
def stream(url):
    """Opens a stream and gives its response and an iterator over its events."""
    clients = []

    def opened(**request):
        client = httpx.Client(timeout=30)
        clients.append(client)
        message = client.build_request("POST", f"{url}/api/generate", json=request)
        response = client.send(message, stream=True)
        return response, map(json.loads, response.iter_lines())

    yield opened
    for client in clients:
        client.close()


def test_tokens_come_in_order_and_the_last_line_is_the_trace(url):
    response = post(url, prompt="Well,", count=2)
    first, *middle, last = events(response)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert first["event"] == "start" and first["given"] == ["Well,"] + [None] * 6
    changes = [change for event in middle for change in event["changes"]]
    assert [change[1] for change in changes if change[0] == 1] == [6, 5, 4, 3, 2, 1]
    assert last["event"] == "end" and len(last["trace"]["samples"]) == 2
    assert last["trace"]["samples"][0]["text"].startswith("Well,so it goes")


def test_a_line_is_sent_when_its_event_happens(fake, stream):
    _, lines = stream(prompt="wait")
    assert next(lines)["event"] == "start"
    assert fake.ended == [], "the rest is still to come"
    fake.go.set()
    assert [*lines][-1]["event"] == "end"


def test_pages_load_nothing_and_document_every_field(url):
    from lomdm_jax.serving.protocol import EVENTS, Request

    page, docs = (httpx.get(f"{url}{path}") for path in ("/", "/docs"))
    for response in (page, docs):
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert not re.search(r"(src|href)=.?(https?:)?//|@import|url\(", response.text)
    for name in (*Request.model_fields, *EVENTS):
        assert f"<code>{name}</code>" in docs.text
    for name in set(Request.model_fields) - {"run"}:
        assert f'id="{name}"' in page.text, "the page must offer every setting"
    runs = httpx.get(f"{url}/api/runs").json()
    assert [run["name"] for run in runs["runs"]] == ["first", "second"]
    assert runs["limits"] == {"characters": 200, "samples": 3}
    assert "/api/generate" in httpx.get(f"{url}/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{", ["JSON"]),
        ("[]", ["dictionary"]),
        ("null", ["dictionary"]),
        ("", ["required"]),
        ("[" * 2000, []),
        ('{"seed": ' + "9" * 2000 + "}", []),
        ('{"prompt": 3}', ["prompt", "string"]),
        ('{"\\ud800": 1}', []),
        ('{"prompts": "/etc/passwd"}', ["prompts", "Extra"]),
        ('{"count": 0}', ["count", "greater"]),
        ('{"count": 1.5}', ["count", "integer"]),
        ('{"count": true}', ["count", "integer"]),
        ('{"count": 4}', ["count is 4", "config.serve.samples = 3"]),
        ('{"temperature": NaN}', ["temperature", "finite"]),
        ('{"temperature": -1}', ["temperature", "greater"]),
        ('{"steps": 10001}', ["steps", "less"]),
        ('{"top_p": 0}', ["top_p", "greater"]),
        ('{"prompt": "%s"}' % ("x" * 201), ["201 characters", "config.serve.characters = 200"]),
        ('{"prompt": "%s", "suffix": "y"}' % ("x" * 200), ["201 characters"]),
        ('{"run": "../../etc/passwd"}', ["run is '../../etc/passwd'"]),
    ],
)
def test_bad_requests_are_refused_with_a_message(fake, url, body, words):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{url}/api/generate", content=body, headers=headers)
    message = refused(response, response.status_code)
    assert response.status_code in (400, 422) and message
    assert all(word in message for word in words), message
    assert fake.started == []


def test_a_form_of_another_site_is_refused(fake, url):
    """What a page may send without asking first is not taken for JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        body, headers = b'{"prompt": "x"}', {"content-type": kind}
        refused(httpx.post(f"{url}/api/generate", content=body, headers=headers), 422)
    assert fake.started == []


def test_too_large_a_body_is_refused_while_it_is_read(fake, url):
    limit = 12 * 200 + 4096
    assert f"{limit:,} bytes" in refused(
        httpx.post(f"{url}/api/generate", content=b"x" * 9000), 413
    )

    def chunks():
        for _ in range(4):
            yield b"x" * 3000  # no Content-Length

    assert "shorten" in refused(httpx.post(f"{url}/api/generate", content=chunks()), 413)
    endless = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n"
    answer = raw(url, endless + b"x" * 16 * (limit + 1))
    assert answer.startswith("HTTP/1.1 413") and "connection: close" in answer
    assert fake.started == []


def test_a_content_length_that_lies_is_refused(url, monkeypatch):
    from lomdm_jax.serving import guard

    monkeypatch.setattr(guard, "PATIENCE", 0.3)
    head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    more = raw(url, head + b'Content-Length: 500\r\n\r\n{"prompt": "x"}')
    assert more.startswith("HTTP/1.1 408") and "send it at once" in more
    less = raw(url, head + b'Content-Length: 5\r\nConnection: close\r\n\r\n{"prompt": "x"}')
    assert less.startswith("HTTP/1.1 422") and "JSON" in less


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]:7860", "[::1]"]
)
def test_names_of_this_machine_are_served(url, host):
    assert httpx.get(f"{url}/api/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1@evil", "["])
def test_other_names_are_refused(url, host):
    """A page of another site, whose name was made to lead here, gets nothing."""
    message = refused(httpx.get(f"{url}/api/runs", headers={"host": host}), 400)
    assert "localhost" in message


def test_elsewhere_than_on_loopback_any_name_is_served(fake, serve):
    with serve(fake, host="0.0.0.0") as url:
        assert httpx.get(f"{url}/api/runs", headers={"host": "a.example"}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page.html"]
)
def test_there_is_nothing_but_the_pages(url, path):
    answer = raw(url, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith("HTTP/1.1 404") and '{"error":"Not Found."}' in answer
    refused(httpx.get(f"{url}/api/generate"), 405)


def test_eight_users_at_once_lose_nothing(fake, serve):
    with serve(fake, queue=16) as url, concurrent.futures.ThreadPoolExecutor(8) as users:
        prompts = [f"user {n}" for n in range(40)]
        answers = [*users.map(lambda prompt: events(post(url, prompt=prompt)), prompts)]
    for prompt, answer in zip(prompts, answers, strict=True):
        revealed = [change[1] for event in answer for change in event.get("changes", [])]
        assert revealed == [6, 5, 4, 3, 2, 1]
        assert answer[-1]["trace"]["samples"][0]["text"].startswith(prompt)
    assert sorted(fake.started) == sorted(prompts) and fake.most_at_once == 1


def test_a_full_queue_answers_503_and_the_others_are_served_in_turn(fake, url, stream, eventually):
    readers = []
    for number in range(3):
        readers.append(stream(prompt=f"wait {number}")[1])
        eventually(lambda: fake.started)  # the first must be on the device
    assert "config.serve.queue" in refused(post(url, prompt="one too many"), 503)
    fake.go.set()
    found = [[*reader] for reader in readers]
    waited = [[e["ahead"] for e in each if e["event"] == "waiting"] for each in found]
    assert waited == [[], [1], [2, 1]]
    assert all(each[-1]["event"] == "end" for each in found)
    assert fake.started == ["wait 0", "wait 1", "wait 2"]
    assert events(post(url, prompt="afterwards"))[-1]["event"] == "end"


def test_a_client_that_leaves_frees_the_device(fake, url, stream, eventually):
    response, lines = stream(prompt="wait, and leave")
    next(lines)
    waiting, _ = stream(prompt="wait in the queue, and leave")
    waiting.close()
    eventually(lambda: refuses_nobody(url))
    response.close()
    eventually(lambda: fake.ended == ["wait, and leave"])
    assert events(post(url, prompt="the next"))[-1]["event"] == "end"
    assert fake.started == ["wait, and leave", "the next"], "who left the queue was not served"


def refuses_nobody(url):
    """Whether there is room for two, found out by two who leave at once."""
    with httpx.Client() as client, httpx.Client() as other:
        statuses = []
        for each in (client, other):
            with each.stream("POST", f"{url}/api/generate", json={"prompt": "wait"}) as response:
                statuses.append(response.status_code)
        return statuses == [200, 200]


def test_a_client_that_does_not_read_holds_nobody_up(fake, url):
    place = urllib.parse.urlsplit(url)
    body = b'{"prompt": "large"}'
    head = "POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(10)
        assert events(post(url, prompt="the next"))[-1]["event"] == "end"
        assert fake.ended == ["large", "the next"]


def test_a_model_that_fails_is_told_and_the_server_goes_on(fake, url, capsys):
    *_, last = events(post(url, prompt="fail"))
    assert last == {"event": "error", "message": "The generation failed: out of paper"}
    assert events(post(url, prompt="on"))[-1]["event"] == "end"


STOPPED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
sys.path[:0] = {paths!r}
from conftest import Fake
from lomdm_jax.config import default_config
from lomdm_jax.serving.app import make_app
from lomdm_jax.serving.device import Device
from lomdm_jax.serving.server import Server, address, listen

config, device = default_config().serve, Device(3)
with listen("127.0.0.1", 0) as listener:
    print(address(listener), flush=True)
    try:
        Server(make_app(Fake(), config, device), device).run(sockets=[listener])
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""


def test_ctrl_c_stops_at_once_whoever_generates_or_waits(serve):
    code = STOPPED.format(paths=[str(HERE), str(HERE.parents[1])])
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        ends, answered = [], [threading.Event(), threading.Event()]

        def ask(has_answer):
            with httpx.stream("POST", f"{url}/api/generate", json={"prompt": "wait"}) as response:
                lines = response.iter_lines()
                first = next(lines)
                has_answer.set()
                ends.append([first, *lines][-1])

        threads = [threading.Thread(target=ask, args=[answer]) for answer in answered]
        for thread, answer in zip(threads, answered, strict=True):
            thread.start()
            assert answer.wait(30)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.stdout.read().strip() == "stopped" and process.wait(10) == 0
        assert time.monotonic() - began < 5
        for thread in threads:
            thread.join()
    assert '"waiting"' in ends[1] or '"waiting"' in ends[0], "both streams ended properly"
