# Copyright © 2026 MLX Contributors

import contextlib
import http.client
import json
import os
import re
import socket
import stat
import tempfile
import threading
import unittest
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

from collecting import collect
from page_server import answers, labels, serving, stopped, write_answers

from mlx_lm.preference.collect import server as servers
from mlx_lm.preference.collect.labels import Label, append_label
from mlx_lm.preference.collect.page import page_token
from mlx_lm.preference.collect.voting import Voting, read_review
from mlx_lm.preference.errors import InputError
from mlx_lm.preference.files import user_cache_folder


def call(url, path="state", body=None, **headers):
    """A request, as (status, content)."""
    data = None
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content_Type": "application/json", **headers}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as e:
        with e:
            return e.code, json.loads(e.read() or b"{}")


def choose(item, text, **more):
    """The vote for the answer with a text."""
    numbers = [answer["number"] for answer in item["answers"]]
    best = next(a["number"] for a in item["answers"] if a["text"] == text)
    rest = [n for n in numbers if n != best]
    return vote(item, "ranking", ranking=[[best], rest], **more)


def vote(item, verdict, **more):
    return {"id": item["id"], "round": item["round"], "verdict": verdict, **more}


class CollectTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory())) / "pairs"
        cache = self.enterContext(tempfile.TemporaryDirectory())
        self.enterContext(mock.patch.dict(os.environ, {"XDG_CACHE_HOME": cache}))

    def write(self, *rows):
        return write_answers(self.folder, rows)


class TestVotes(CollectTest):
    def test_each_vote_is_a_line_with_what_was_shown(self):
        rows = [answers(f"q{i}", "good", "poor", prompt=f"Q{i}") for i in range(4)]
        self.write(*rows, answers("alone", "the only one"))
        with serving(self.folder) as (_, url):
            state = call(url)[1]
            self.assertEqual((state["done"], state["total"]), (0, 4))
            for verdict in ("ranking", "tie", "bad", "none"):
                item = state["item"]
                body = vote(item, verdict, seconds=1.26)
                if verdict == "ranking":
                    body = choose(item, "good", seconds=1.26)
                status, state = call(url, "vote", body)
                line = labels(self.folder)[-1]
                self.assertEqual(status, 200)
                self.assertEqual((line["id"], line["verdict"]), (item["id"], verdict))
                self.assertEqual(line["judge"], "human:anna")
                self.assertEqual(
                    line["shown"], [answer["number"] for answer in item["answers"]]
                )
                self.assertEqual(line["seconds"], 1.3)
            self.assertIsNone(state["item"])
            counts = {"ranking": 1, "tie": 1, "bad": 1, "none": 1, "edited": 0}
            self.assertEqual(state["counts"], counts)
            self.assertAlmostEqual(state["pace"], 4 / (4 * 1.3) * 60)
            first = labels(self.folder)[0]
            # Whatever the side, the label is about the response.
            self.assertEqual(first["ranking"], [[0], [1]])
            made = call(url, "finish", {})[1]["made"]
            counts = {
                "without a verdict": 1,
                "tied": 1,
                "all bad": 1,
                "with one answer": 1,
            }
            self.assertEqual(made, {"rows": 1, "train": 1, "valid": 0, **counts})
            self.assertEqual(call(url, "finish", {})[1]["made"], made)
        (row,) = (self.folder / "train.jsonl").read_text().splitlines()
        self.assertIn("good", json.loads(row)["chosen"][0]["content"])

    def test_sides_are_drawn_once_for_each_person(self):
        self.write(*(answers(f"q{i}", "a", "b") for i in range(400)))
        drawn = {}
        for name in ("anna", "ben"):
            shown = [q.shown for q in Voting(self.folder, name).questions.values()]
            again = [q.shown for q in Voting(self.folder, name).questions.values()]
            self.assertEqual(shown, again)
            # A fair coin: more than 5 deviations off once in a million.
            self.assertLess(abs(sum(s[0] for s in shown) - 200), 50)
            drawn[name] = shown
        alike = sum(a == b for a, b in zip(drawn["anna"], drawn["ben"]))
        self.assertLess(abs(alike - 200), 50)

    def test_what_is_no_vote_changes_nothing(self):
        self.write(answers("q", "a", "b"))
        edit = {"response": 0, "text": "better"}
        wrong = [
            {"verdict": "ranking"},
            {"verdict": "ranking", "ranking": [[0], [2]]},
            {"verdict": "ranking", "ranking": [[0], [0]]},
            {"verdict": "ranking", "ranking": "01"},
            {"verdict": "scores", "scores": [1, 0]},
            {"verdict": "withdrawn"},
            {"verdict": ["tie"]},
            {},
            {"verdict": "tie", "edited": edit},
            {"verdict": "ranking", "ranking": [[1], [0]], "edited": edit},
            {"verdict": "ranking", "ranking": [[0], [1]], "edited": {"response": 0}},
            {
                "verdict": "ranking",
                "ranking": [[0], [1]],
                "edited": {**edit, "text": " "},
            },
            {"verdict": "ranking", "ranking": [[0], [1]], "edited": {**edit, "x": 1}},
            {
                "verdict": "ranking",
                "ranking": [[0], [1]],
                "edited": {**edit, "text": "x" * 200_001},
            },
            {"verdict": "tie", "id": "other"},
            {"verdict": "tie", "id": ["q"]},
            {"verdict": "tie", "round": 1},
        ]
        with serving(self.folder) as (_, url):
            for one in wrong:
                with self.subTest(one=str(one)[:80]):
                    body = {"id": "q", "round": 0, **one}
                    status, content = call(url, "vote", body)
                    self.assertEqual(status, 400)
                    self.assertIn("error", content)
            self.assertFalse((self.folder / "labels.jsonl").exists())
            self.assertEqual(call(url)[1]["done"], 0)

    def test_a_vote_sent_twice_is_one_and_another_one_does_not_replace_it(self):
        self.write(*(answers(f"q{i}", "a", "b") for i in range(3)))
        with serving(self.folder) as (_, url):
            first = call(url)[1]["item"]
            body = choose(first, "a")
            states = [call(url, "vote", body) for _ in range(2)]
            self.assertEqual([status for status, _ in states], [200, 200])
            self.assertEqual(len(labels(self.folder)), 1)
            # A second tab had shown the same pair.
            status, state = call(url, "vote", choose(first, "b"))
            self.assertEqual(status, 409)
            self.assertEqual(state["item"]["id"], "q1")
            self.assertEqual(len(labels(self.folder)), 1)

    def test_many_tabs_at_once(self):
        self.write(*(answers(f"q{i}", "a", "b") for i in range(40)))
        with serving(self.folder) as (_, url):

            def work():
                while item := call(url)[1]["item"]:
                    call(url, "vote", choose(item, "a"))

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual(len({one["id"] for one in labels(self.folder)}), 40)
        self.assertEqual(len(labels(self.folder)), 40)

    def test_two_people_at_once(self):
        self.write(*(answers(f"q{i}", "a", "b") for i in range(20)))
        with contextlib.ExitStack() as stack:
            urls = [
                stack.enter_context(serving(self.folder, name))[1]
                for name in ("anna", "ben")
            ]
            self.assertNotEqual(*(urlsplit(url).path for url in urls))

            def work(url):
                while item := call(url)[1]["item"]:
                    call(url, "vote", choose(item, "a"))

            threads = [threading.Thread(target=work, args=(url,)) for url in urls]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for url in urls:
                (found,) = call(url)[1]["agreement"]
                self.assertEqual((found["pairs"], found["share"]), (20, 1.0))
        self.assertEqual(len(labels(self.folder)), 40)

    def test_undo_takes_back_the_last_and_the_one_before_it(self):
        self.write(*(answers(f"q{i}", "a", "b") for i in range(3)))
        edited = {"response": 0, "text": "a, but better"}
        with serving(self.folder) as (_, url):
            state = call(url)[1]
            state = call(url, "vote", choose(state["item"], "a", edited=edited))[1]
            state = call(url, "vote", vote(state["item"], "none"))[1]
        with serving(self.folder) as (_, url):
            state = call(url)[1]
            self.assertEqual(state["counts"]["edited"], 1)
            for id in ("q1", "q0"):
                asked = state["last"]
                state = call(url, "undo", asked)[1]
                self.assertEqual(state["item"]["id"], id)
                # The answer to it was lost: asked again, it takes back no more.
                self.assertEqual(
                    call(url, "undo", asked)[1]["done"], 1 if id == "q1" else 0
                )
            self.assertEqual(state["item"]["was"]["edited"], edited)
            self.assertIsNone(state["last"])
            self.assertEqual(sum(state["counts"].values()), 0)
        self.assertEqual(labels(self.folder)[-1]["verdict"], "withdrawn")

    def test_skipped_ones_come_again_when_asked_for(self):
        self.write(*(answers(f"q{i}", "a", "b") for i in range(3)))
        with serving(self.folder) as (_, url):
            for verdict in ("none", "tie", "none"):
                item = call(url)[1]["item"]
                call(url, "vote", vote(item, verdict))
            self.assertIsNone(call(url)[1]["item"])
            self.assertEqual(labels(self.folder)[0]["why"], "skipped")
            state = call(url, "again", {})[1]
            self.assertEqual((state["item"]["id"], state["done"]), ("q0", 1))

    def test_rounds_are_told_apart(self):
        self.write(answers("q", "a", "b"), answers("q", "c", "d", round=1))
        with serving(self.folder) as (_, url):
            state = call(url, "vote", choose(call(url)[1]["item"], "a"))[1]
            self.assertEqual(state["item"]["round"], 1)
            call(url, "vote", choose(state["item"], "d"))
        self.assertEqual([one["round"] for one in labels(self.folder)], [0, 1])

    def test_agreement_with_others_that_judge_meanwhile(self):
        self.write(*(answers(f"q{i}", "a", "b", "c") for i in range(3)))
        say = lambda i, **more: append_label(
            self.folder, Label(f"q{i}", "function:f.py:f", **more)
        )
        say(0, verdict="scores", scores=[3, 2, 1])
        with serving(self.folder) as (_, url):
            for _ in range(3):
                item = call(url)[1]["item"]
                call(url, "vote", vote(item, "ranking", ranking=[[0], [1, 2]]))
            # 0 before 1 and before 2 alike; they differ in 1 and 2.
            (found,) = call(url)[1]["agreement"]
            self.assertEqual((found["pairs"], found["share"]), (3, 2 / 3))
            say(1, verdict="tie")
            say(2, verdict="none", why="it failed")
            (found,) = call(url)[1]["agreement"]
            self.assertEqual((found["pairs"], found["share"]), (6, 1 / 2))
            say(1, verdict="withdrawn")
            (found,) = call(url)[1]["agreement"]
            self.assertEqual((found["pairs"], found["share"]), (3, 2 / 3))
            last = call(url)[1]["last"]
            for _ in range(3):
                last = call(url, "undo", last)[1]["last"]
            self.assertEqual(call(url)[1]["agreement"], [])

    def test_nothing_to_judge(self):
        self.write(answers("q", "the only one"))
        with self.assertRaisesRegex(InputError, "no prompt with two different"):
            Voting(self.folder, "anna")

    def test_a_full_disk_is_said_and_the_vote_can_be_sent_again(self):
        self.write(answers("q", "a", "b"))
        with serving(self.folder) as (_, url):
            body = choose(call(url)[1]["item"], "a")
            full = mock.patch("os.fsync", side_effect=OSError(28, "No space left"))
            with full:
                status, content = call(url, "vote", body)
            self.assertEqual(status, 507)
            self.assertIn("No space left", content["error"])
            self.assertEqual(call(url, "vote", body)[0], 200)


class TestReview(CollectTest):
    def test_only_those_listed_with_the_earlier_label_after_the_vote(self):
        self.write(*(answers(f"q{i}", "a", "b") for i in range(4)))
        with serving(self.folder) as (_, url):
            while item := call(url)[1]["item"]:
                call(url, "vote", choose(item, "a"))
        append_label(
            self.folder, Label("q1", "reward", "scores", scores=[0.0, 1.0], certainty=1)
        )
        # A tie is no opposite.
        append_label(self.folder, Label("q2", "reward", "tie"))
        keys, _ = read_review(self.folder, self.folder)
        self.assertEqual(keys, {(0, "q1"): "judges disagree"})
        listed = self.folder.parent / "adapters"
        listed.mkdir()
        lines = '{"id": "q3", "round": 0, "why": "surely"}\n{"id": "q1"}\n{"id": "x"}\n'
        lines += '{"id": "q1", "round": []}\n{"id": "q3", "round": null}\n'
        (listed / "review.jsonl").write_text(lines)
        keys, _ = read_review(listed, self.folder)
        look = {"again": keys, "mark": "review 1"}
        with serving(self.folder, **look) as (_, url):
            state = call(url)[1]
            self.assertEqual((state["total"], state["done"]), (2, 0))
            self.assertNotIn("earlier", state)
            # In the order of the list: what is skipped stays as it was.
            state = call(url, "vote", vote(state["item"], "none"))[1]
            self.assertEqual(state["why"], "surely")
            last = labels(self.folder)[-1]
            self.assertEqual((last["id"], last["ranking"]), ("q3", [[0], [1]]))
            state = call(url, "vote", choose(state["item"], "b"))[1]
            found = {one["judge"]: one["same"] for one in state["earlier"]}
            self.assertEqual(found, {"human:anna": False, "reward": True})
            self.assertEqual((state["done"], state["item"]), (2, None))
        with serving(self.folder, **look) as (_, url):
            self.assertEqual(call(url)[1]["done"], 2)
            state = call(url, "undo", {"id": "q1", "round": 0})[1]
            self.assertEqual((state["item"]["id"], state["done"]), ("q1", 1))
        # The first label holds again.
        self.assertEqual(labels(self.folder)[-1]["ranking"], [[0], [1]])
        with serving(self.folder) as (_, url):
            self.assertEqual(call(url)[1]["done"], 4)

    def test_a_look_at_disagreements_goes_on(self):
        self.write(*(answers(f"q{i}", "a", "b") for i in range(3)))
        for i in range(3):
            label = Label(f"q{i}", "reward", "scores", scores=[0.0, 1.0])
            append_label(self.folder, label)
            append_label(
                self.folder, Label(f"q{i}", "human:anna", "ranking", ranking=[[0], [1]])
            )
        own = "--label", "human:anna", "--output", self.folder, "--port", "0"
        own += "--review", self.folder

        def look(server, **_):
            # One stays as it was, one agrees with the other judge now.
            for text in "ab":
                item = server.voting.state()["item"]
                server.voting.vote(choose(item, text))
            raise KeyboardInterrupt

        with mock.patch.object(servers.PageServer, "serve_forever", look):
            self.assertIn("3 of 3 to judge as anna", collect(*own)[1])
        with stopped():
            self.assertIn("1 of 2 to judge as anna", collect(*own)[1])
            # Another judge is a reason for another look.
            for i in range(2):
                label = Label(f"q{i}", "model:m", "scores", scores=[0.0, 1.0])
                append_label(self.folder, label)
            self.assertIn("2 of 2 to judge as anna", collect(*own)[1])

    def test_a_folder_that_lists_nothing(self):
        self.write(answers("q", "a", "b"))
        with self.assertRaisesRegex(InputError, "has no review.jsonl"):
            read_review(self.folder.parent, self.folder)
        with self.assertRaisesRegex(InputError, "nothing to look at again.*agree.$"):
            Voting(self.folder, "anna", again={}, mark="review 1")


class TestRefused(CollectTest):
    def setUp(self):
        super().setUp()
        self.write(answers("q", "a", "b"))
        self.server, self.url = self.enterContext(serving(self.folder))
        self.port = self.server.server_port
        self.path = urlsplit(self.url).path

    def raw(self, text):
        """What comes back for the bytes of a request."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as s:
            s.sendall(text)
            s.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: s.recv(65536), b""))

    def test_other_hosts(self):
        for host in (
            "evil.example",
            f"evil.example:{self.port}",
            "127.0.0.1",
            "127.0.0.1:1",
            f"127.0.0.1.evil.example:{self.port}",
            f"0.0.0.0:{self.port}",
            "",
        ):
            with self.subTest(host=host):
                for path in ("", "state", "pulse"):
                    status, content = call(self.url, path, Host=host)
                    self.assertEqual(status, 403)
                    self.assertNotIn("item", content)
        for host in (f"127.0.0.1:{self.port}", f"localhost:{self.port}"):
            self.assertEqual(call(self.url, Host=host)[0], 200)
        two = f"GET {self.path}state HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        answer = self.raw((two + "Host: evil.example\r\n\r\n").encode())
        self.assertIn(b" 403 ", answer.splitlines()[0])
        answer = self.raw(f"GET {self.path}state HTTP/1.0\r\n\r\n".encode())
        self.assertIn(b" 403 ", answer.splitlines()[0])

    def test_without_the_token(self):
        base = f"http://127.0.0.1:{self.port}"
        token = self.server.token
        for path in (
            "/",
            "/state",
            "/x/state",
            f"/{token[:-1]}/state",
            f"/{token}x/state",
            f"/state?token={token}",
            f"/{token.lower()}/",
            "/%00/",
        ):
            with self.subTest(path=path):
                self.assertEqual(call(base, path)[0], 403)
        self.assertEqual(call(base, f"/{token}")[0], 404)
        self.assertEqual(call(self.url, "../../etc/passwd")[0], 404)
        self.assertEqual(call(self.url, "answers.jsonl")[0], 404)

    def test_other_origins(self):
        body = vote(call(self.url)[1]["item"], "tie")
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": f"https://127.0.0.1:{self.port}"},
            {"Origin": f"http://localhost:{self.port}"},
            {"Origin": f"http://127.0.0.1:{self.port + 1}"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
        ):
            with self.subTest(headers=headers):
                self.assertEqual(call(self.url, "vote", body, **headers)[0], 403)
                self.assertEqual(call(self.url, **headers)[0], 403)
        self.assertFalse((self.folder / "labels.jsonl").exists())
        same = {"Origin": f"http://127.0.0.1:{self.port}"}
        same["Sec_Fetch_Site"] = "same-origin"
        self.assertEqual(call(self.url, "vote", body, **same)[0], 200)

    def test_large_and_malformed_requests(self):
        head = f"POST {self.path}vote HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        kind = "Content-Type: application/json\r\n"
        for more, status in (
            ("\r\n", 411),
            ("Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
            ("Content-Length: -1\r\n\r\n", 411),
            ("Content-Length: 2000001\r\n\r\n", 413),
            (f"Content-Length: {'9' * 11}\r\n\r\n", 413),
            ("Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}", 415),
            (f"{kind}Content-Length: 2\r\n\r\n[]", 400),
            (f"{kind}Content-Length: 1\r\n\r\n{{", 400),
            (f"{kind}Content-Length: 90000\r\n\r\n{'[' * 90000}", 400),
            (f"{kind}Content-Length: 9\r\n\r\n{{}}", 400),
            ("X: " + "x" * 70000 + "\r\n\r\n", 431),
        ):
            with self.subTest(more=more[:50]):
                answer = self.raw((head + more).encode())
                self.assertIn(f" {status} ".encode(), answer.splitlines()[0])
        self.assertIn(b"400", self.raw(b"\x16\x03\x01\x02\x00\x01\x00"))
        for method in ("PUT", "DELETE", "OPTIONS"):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            with contextlib.closing(connection):
                connection.request(method, self.path + "vote")
                self.assertEqual(connection.getresponse().status, 501)
        self.assertEqual(call(self.url)[0], 200)

    def test_silent_connections_keep_nobody_out(self):
        with contextlib.ExitStack() as stack, mock.patch.object(
            servers.Handler, "timeout", 0.5
        ):
            for _ in range(servers.MOST_CONNECTIONS + 8):
                one = socket.create_connection(("127.0.0.1", self.port), timeout=5)
                stack.enter_context(one)
            for _ in range(100):
                with contextlib.suppress(OSError):
                    self.assertEqual(call(self.url)[0], 200)
                    break
            else:
                self.fail("Nobody was answered.")

    def test_the_page_may_load_nothing_and_is_kept_nowhere(self):
        with urllib.request.urlopen(self.url, timeout=5) as answer:
            text, headers = answer.read().decode(), answer.headers
        policy = headers["Content-Security-Policy"]
        self.assertIn("default-src 'none'", policy)
        self.assertIn("require-trusted-types-for 'script'", policy)
        self.assertNotIn("unsafe", policy)
        self.assertEqual(headers["Cache-Control"], "no-store")
        self.assertEqual(headers["Referrer-Policy"], "no-referrer")
        self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
        self.assertNotIn("Python", headers["Server"])
        # The sources of its parts are in it, and it writes no HTML.
        self.assertEqual(re.findall(r"<(?:script|style|link)[^>]* src=", text), [])
        self.assertNotIn("innerHTML", text)
        self.assertNotIn("style=", text)
        outside = re.findall(r"(?:https?:)?//[\w.]+\.\w+", text)
        self.assertEqual([x for x in outside if "www.w3.org" not in x], [])

    def test_the_token_is_secret_and_the_same_again(self):
        self.assertRegex(self.server.token, r"^[\w-]{24}$")
        self.assertEqual(
            page_token(self.folder, "human:anna"), page_token(self.folder, "human:anna")
        )
        others = {page_token(self.folder, "ben"), page_token("elsewhere", "anna")}
        self.assertEqual(len(others | {self.server.token}), 3)
        key = user_cache_folder("collect") / "page-key"
        self.assertEqual(stat.S_IMODE(key.stat().st_mode), 0o600)
        key.write_bytes(b"")
        # What is no key is none: then the address is a new one each time.
        self.assertNotEqual(page_token("x", "anna"), page_token("x", "anna"))


if __name__ == "__main__":
    unittest.main()
