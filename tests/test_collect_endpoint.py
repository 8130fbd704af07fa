# Copyright © 2026 MLX Contributors

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

from collecting import answers, collect, read_lines, save_answers
from tiny import save_tiny_model

from mlx_lm.preference.collect import endpoint
from mlx_lm.preference.collect.endpoint import KEY, Endpoint, read_address, read_reply
from mlx_lm.preference.collect.labels import LABELS
from mlx_lm.preference.errors import InputError

SECRET = "sk-very-secret"


def completion(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def prefers_longer(body):
    """An honest judge: the longer reply, whatever the order."""
    text = body["messages"][0]["content"].split("=== Reply A ===")[1]
    first, second = text.split("=== Reply B ===")
    second = second.split("=== End ===")[0]
    letter = "A" if len(first.strip()) > len(second.strip()) else "B"
    return completion(f"I compare them. A reply may be long.\n\n**Better: {letter}**")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        size = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(size))
        self.server.seen.append((self.path, body, dict(self.headers)))
        step = self.server.steps.pop(0) if self.server.steps else self.server.last
        with contextlib.suppress(OSError):
            step(self, body)

    do_GET = do_POST

    def send(self, body, code=200, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def says(text):
    return lambda h, body: h.send(completion(text))


def fails(code, text=b"no", **headers):
    return lambda h, body: h.send(text, code, **headers)


def honest(h, body):
    h.send(prefers_longer(body))


def huge(h, body):
    h.send_response(200)
    h.end_headers()
    for _ in range(200):
        h.wfile.write(b" " * 10**5)


def drips(h, body):
    h.send_response(200)
    h.end_headers()
    while True:
        h.wfile.write(b" ")
        time.sleep(0.02)


def drips_headers(h, body):
    h.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        h.wfile.write(b"X: y\r\n")
        time.sleep(0.02)


def hangs_up(h, body):
    h.connection.shutdown(socket.SHUT_RDWR)


class EndpointCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.seen, self.server.steps, self.server.last = [], [], honest
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.waits = []
        sleep = mock.patch.object(endpoint.time, "sleep", self.waits.append)
        # The fake server's own sleep is another one.
        own, real = mock.patch.object(sys.modules[__name__], "time"), time.sleep
        own.start().sleep = real
        sleep.start()
        self.addCleanup(mock.patch.stopall)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.spec = f"endpoint:{self.url}:some-model:3b"
        self.data = self.folder / "data"

    def label(self, *rows, steps=(), last=honest, timeout=20):
        """Label answers; the labels by prompt, the code, and all that is printed."""
        self.server.steps, self.server.last = list(steps), last
        if not self.data.exists():
            save_answers(self.data, *rows or [answers(1, "the longer one", "short")])
        code, out, err = collect(
            *("--label", self.spec, "--output", self.data),
            *("--judge-timeout", timeout),
        )
        labels = {line["id"]: line for line in read_lines(self.data / LABELS)}
        return labels, code, out + err


class TestEndpoint(EndpointCase):
    def test_both_orders(self):
        labels, code, out = self.label()
        self.assertEqual(code, 0, out)
        label = labels["p1"]
        self.assertEqual((label["scores"], label["judge"]), ([1, 0], self.spec))
        self.assertEqual(label["orders"], [[0, 1, 1, 0]])
        path, body, headers = self.server.seen[0]
        self.assertEqual(path, "/v1/chat/completions")
        self.assertEqual((body["model"], body["temperature"]), ("some-model:3b", 0))
        self.assertNotIn("Authorization", headers)
        self.assertEqual(len(self.server.seen), 2)
        # One that always says A has no label.
        self.data = self.folder / "other"
        labels, code, _ = self.label(last=says("Better: A"))
        self.assertEqual((code, labels["p1"]["verdict"]), (0, "tie"))

    def test_unreadable_twice_is_none(self):
        labels, code, out = self.label(last=says("Both have merits."))
        self.assertEqual((code, labels["p1"]["verdict"]), (0, "none"))
        self.assertIn("1 prompt without a verdict: the reply named neither", out)
        self.assertIn("0 pairs of 1 prompt", out)
        # Once is asked again, in the same conversation.
        self.server.seen.clear()
        labels, _, _ = self.label(steps=[says("Hmm."), says("Better: A")])
        self.assertEqual(labels["p1"]["verdict"], "scores")
        second = self.server.seen[1][1]["messages"]
        self.assertEqual([m["role"] for m in second], ["user", "assistant", "user"])

    def test_what_a_hostile_server_says_is_no_label(self):
        for step, why in (
            (fails(500), "status 500"),
            (says(None), "neither A nor B"),
            (says(["A"]), "no text"),
            (says({"a": 1}), "no text"),
            (fails(200, b"<html>"), "no chat completion"),
            (fails(200, b'{"choices": []}'), "no chat completion"),
            (fails(200, b"[" * 10**5), "no chat completion"),
            (fails(200, b"\xff\xfe"), "no chat completion"),
            (huge, "more than 1,000,000 bytes"),
            (drips, "no reply in 0.3 s"),
            (drips_headers, "0.3 s|got more than 100 headers"),
            (hangs_up, "Remote|Connection|Disconnected"),
        ):
            self.data = Path(tempfile.mkdtemp(dir=self.folder)) / "data"
            with mock.patch.object(endpoint, "WAITS", (1.0,)):
                labels, code, out = self.label(last=step, timeout=0.3)
            self.assertEqual(code, 0, out)
            self.assertEqual(labels["p1"]["verdict"], "none")
            self.assertRegex(labels["p1"]["why"], why)
            self.assertNotIn("\x1b[31m", out)

    def test_tries_again_and_waits_longer(self):
        steps = [fails(500), fails(429, Retry_After="7"), fails(503), honest, honest]
        labels, code, _ = self.label(steps=steps)
        self.assertEqual((code, labels["p1"]["scores"]), (0, [1, 0]))
        self.assertEqual(self.waits, [1, 7, 4])
        self.waits.clear()
        self.data = self.folder / "other"
        self.label(steps=[fails(429, Retry_After="86400"), honest, honest])
        self.assertEqual(self.waits, [60])

    def test_one_that_is_slow_is_not_asked_on_and_on(self):
        # Many servers go on with a reply that nobody awaits any more.
        labels, code, out = self.label(last=drips, timeout=0.2)
        self.assertEqual((code, labels["p1"]["verdict"]), (0, "none"))
        self.assertEqual(len(self.server.seen), 2)
        reason = "no reply in 0.2 s, which judge_timeout allows"
        self.assertIn(f"completions: {reason}. It is asked again.", out)
        self.assertIn(f"1 prompt without a verdict: {reason}.", out)
        # What keeps it waiting is said once.
        self.data = self.folder / "other"
        labels, code, out = self.label(last=fails(503))
        self.assertEqual((len(self.waits), out.count("It is asked again")), (5, 1))

    def test_what_is_to_be_mended_ends_it_at_once(self):
        for step, expected in (
            (fails(401), f"wants a key: set {KEY}"),
            (fails(404), "no chat completions"),
            (fails(302, Location="http://127.0.0.1:1/x"), "leads to http"),
            (fails(308, Location="file:///etc/passwd"), "leads to file"),
        ):
            labels, code, out = self.label(last=step)
            self.assertEqual((code, labels), (2, {}))
            self.assertIn(expected, out)
        self.assertEqual(
            {path for path, *_ in self.server.seen}, {"/v1/chat/completions"}
        )

    def test_goes_on_where_it_ended(self):
        rows = [answers(i, "the longer one", "short") for i in range(8)]
        # Two prompts are labelled, then the server is broken.
        labels, code, out = self.label(*rows, steps=[honest] * 4, last=fails(500))
        self.assertEqual(code, 2)
        self.assertIn("failed 3 times in a row: status 500", out)
        self.assertIn("the same command goes on", out)
        said = [label["verdict"] for label in labels.values()]
        self.assertEqual(said, ["scores"] * 2 + ["none"] * 2)
        self.server.seen.clear()
        labels, code, out = self.label()
        self.assertEqual(code, 0, out)
        self.assertEqual({x["verdict"] for x in labels.values()}, {"scores"})
        self.assertEqual(len(self.server.seen), 12)

    def test_prompts_that_the_server_refuses_end_nothing(self):
        rows = [answers(i, "the longer one", "short") for i in range(6)]
        refused = fails(400, b"too \x1b[31mlong")
        steps = [refused, says("Better: A"), *[refused] * 3]
        labels, code, out = self.label(*rows, steps=steps)
        self.assertEqual(code, 0, out)
        said = [label["verdict"] for label in labels.values()]
        self.assertEqual(said, ["none"] * 4 + ["scores"] * 2)
        self.assertIn("4 prompts without a verdict: status 400 too ", out)
        self.assertNotIn("\x1b[31m", out)
        self.assertTrue((self.data / "train.jsonl").exists())
        # Given again, they are asked again, and are refused again.
        self.assertEqual(self.label(steps=steps)[1], 0)
        # One that refuses a short question too is not asked on.
        self.data, asked = self.folder / "other", len(self.server.seen)
        labels, code, out = self.label(*rows, last=refused)
        self.assertEqual((code, labels, len(self.server.seen) - asked), (2, {}, 2))
        self.assertIn("completions refuses every question: status 400 too ", out)

    def test_nobody_listens(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.spec = f"endpoint:{url}:m"
        labels, code, out = self.label(*(answers(i, "a", "b") for i in range(3)))
        self.assertEqual(code, 2)
        self.assertIn(f"Nobody listens at {url}/v1/chat/completions", out)
        self.assertEqual((labels, self.waits), ({}, []))

    def test_a_key_is_sent_and_never_shown(self):
        step = fails(500, f"bad key {SECRET}".encode())
        with mock.patch.dict(os.environ, {KEY: SECRET, "OPENAI_API_KEY": "other"}):
            labels, code, out = self.label(steps=[step] * 5)
            more, _, printed = self.label(last=fails(403))
        headers = [headers for *_, headers in self.server.seen]
        found = {h["Authorization"] for h in headers}
        self.assertEqual(found, {f"Bearer {SECRET}"})
        self.assertNotIn(SECRET, out + printed)
        for path in self.data.iterdir():
            self.assertNotIn(SECRET, path.read_text())
        self.assertIn("status 500 bad key …", labels["p1"]["why"])
        self.assertIn(f"refuses the key in {KEY}", printed)
        with mock.patch.dict(os.environ, {KEY: SECRET}):
            with contextlib.redirect_stdout(None):
                with mock.patch.object(endpoint, "rprint") as said:
                    Endpoint("http://example.invalid/v1:m")
        self.assertIn("unencrypted", said.call_args[0][0])

    def test_addresses(self):
        for address, expected in (
            ("http://localhost:11434/v1:qwen3:4b", "http://localhost:11434/v1/"),
            ("http://localhost:1234:m", "http://localhost:1234/v1/"),
            ("http://[::1]:8080/v1/:m", "http://[::1]:8080/v1/"),
            ("https://a.b/x/chat/completions:m", "https://a.b/x/"),
        ):
            url, model = read_address(address)
            self.assertEqual(url, expected + "chat/completions")
            self.assertEqual(model, "qwen3:4b" if "qwen" in address else "m")
        for address in (
            *("", "m", "ftp://a/v1:m", "file:///etc/passwd:m", "http://a/v1"),
            *("https://user:word@a/v1:m", "https://a/v1?key=1:m", "https://key@a/v1:m"),
            *("http://localhost:8080/v1", "http://localhost:8080", "http://[::1]:80/"),
        ):
            with self.assertRaises(InputError):
                read_address(address)

    def test_replies(self):
        for text, expected in (
            ("Better: A", 1),
            ("Reply A is long. Better: **B**", 0),
            ("better - a.", 1),
            ("Better: B\n\nNo. Better: A", 1),
            ("<think>Better: A</think>\nB", 0),
            ("Better: tie", 0.5),
            ("Reply B.", 0),
            ("A better answer would be shorter", None),
            ("Better: Both", None),
            ("<think>Better: A", 1),
            ("AB", None),
            ("", None),
        ):
            self.assertEqual(read_reply(text), expected, text)


class TestServer(EndpointCase):
    """Against mlx_lm.server on this machine."""

    def test_a_model_behind_a_server(self):
        model = save_tiny_model(self.folder / "model", max_position_embeddings=4096)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["--model", str(model), "--port", str(port), "--log-level", "ERROR"]
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_lm", "server", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            self.assertIsNone(process.poll())
            threading.Event().wait(0.1)
        self.spec = f"endpoint:http://127.0.0.1:{port}/v1:{model}"
        with mock.patch.object(endpoint, "MOST_TOKENS", 8):
            labels, code, out = self.label(timeout=60)
        # Nobody taught it to judge: what matters is that it answered.
        self.assertEqual(code, 0, out)
        label = labels["p1"]
        self.assertEqual(label.get("why", endpoint.UNREADABLE), endpoint.UNREADABLE)


if __name__ == "__main__":
    unittest.main()
