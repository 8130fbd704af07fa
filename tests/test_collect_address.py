# Copyright © 2026 MLX Contributors

import contextlib
import io
import re
import shlex
import signal
import tempfile
import unittest
from urllib.parse import urlsplit

from collecting import collect
from page_server import answers, labels, process, serving, stopped
from test_collect_server import CollectTest, call, choose

from mlx_lm import dpo_collect
from mlx_lm.preference.collect.labels import Label, append_label
from mlx_lm.preference.collect.page import read_page
from mlx_lm.preference.collect.server import label_by_hand
from mlx_lm.preference.errors import InputError


class TestCommandLine(CollectTest):
    def test_a_port_in_use_is_one_line(self):
        self.write(answers("q", "a", "b"))
        with serving(self.folder) as (server, _):
            for host, port, words in (
                ("127.0.0.1", server.server_port, "is in use: name another one"),
                ("192.0.2.1", 0, "Can't listen at 192.0.2.1"),
                ("127.0.0.1", 70000, "Can't listen at"),
                ("no such host", 0, "Can't listen at"),
            ):
                with self.subTest(host=host, port=port), self.assertRaisesRegex(
                    InputError, words
                ) as caught:
                    label_by_hand(self.folder, host=host, port=port, make_pairs=str)
                self.assertNotIn("\n", str(caught.exception))

    def test_names_that_are_none(self):
        self.write(answers("q", "a", "b"))
        for name in ("a\x1b[31m", "x" * 61, " ", "a\n"):
            with self.assertRaisesRegex(InputError, "no name for a judge"):
                label_by_hand(self.folder, name, make_pairs=str)

    def test_the_end_names_the_count_and_the_command(self):
        self.write(*(answers(f"q{i}", "a", "b") for i in range(2)))
        go_on = f"mlx_lm.dpo_collect --label human:anna --output {self.folder}"
        train = f"mlx_lm.dpo --model MODEL --data {self.folder} --train --epochs 1"
        for number, end in ((signal.SIGINT, go_on), (signal.SIGTERM, train)):
            with process(self.folder) as (running, url):
                call(url, "vote", choose(call(url)[1]["item"], "a"))
                if number == signal.SIGTERM:
                    # As the page does behind the last vote.
                    call(url, "finish", {})
                running.send_signal(number)
                said = running.communicate(timeout=60)[0]
                self.assertEqual(running.returncode, 0)
            done = 1 if end == go_on else 2
            self.assertIn(f"Judged {done} of 2 ({done} preferred).", said)
            self.assertIn(end, said)
            # The pairs are made once of the same votes.
            self.assertEqual(said.count("of 2 prompts"), 1, said)

    def test_the_commands_keep_what_was_given(self):
        self.folder = self.folder.parent / "my pairs"
        self.write(*(answers(f"q{i}", "a", "b") for i in range(2)))
        (self.folder / "review.jsonl").write_text('{"id": "q0"}\n')
        given = ["--label", "human:anna", "--output", str(self.folder), "--port", "0"]
        given += ["--pairs", "all", "--weights", "agreement", "--model", "my model"]
        given += ["--review", str(self.folder), "--no-browser"]
        with stopped():
            code, out, err = collect(*given)
        self.assertEqual(code, 0, err)
        (command,) = re.findall(r"Go on with\n  mlx_lm.dpo_collect (.*)", out)
        first, again = map(dpo_collect.resolve_args, (given, shlex.split(command)))
        self.assertEqual(first.explicit - again.explicit, {"no_browser"})
        for name in again.explicit:
            self.assertEqual(getattr(first, name), getattr(again, name))
        append_label(self.folder, Label("q0", "human:anna", "bad"))
        append_label(self.folder, Label("q1", "human:anna", "bad"))
        with stopped():
            out = collect(*given[:-3])[1]
        train = f"--data '{self.folder}' --train --epochs 1 --weight-feature weight\n"
        self.assertIn(train, out)

    def test_killed_it_goes_on_at_the_same_address(self):
        self.write(*(answers(f"q{i}", "a", "b") for i in range(30)))
        cache = self.enterContext(tempfile.TemporaryDirectory())
        with process(self.folder, cache=cache) as (running, url):
            for _ in range(10):
                call(url, "vote", choose(call(url)[1]["item"], "a"))
            running.kill()
        # What a kill in the middle of a line leaves.
        with open(self.folder / "labels.jsonl", "a") as file:
            file.write('{"id": "q10", "judge": "human:an')
        port = urlsplit(url).port
        with process(self.folder, port, cache=cache) as (running, again):
            self.assertEqual(again, url)
            state = call(url)[1]
            self.assertEqual((state["done"], state["item"]["id"]), (10, "q10"))
            call(url, "vote", choose(state["item"], "b"))
        self.assertEqual([x["id"] for x in labels(self.folder)][10:], ["q10"])

    def test_named_hosts_in_a_network(self):
        self.write(answers("q", "a", "b"))
        said = io.StringIO()
        with stopped(), contextlib.redirect_stdout(said):
            label_by_hand(self.folder, host="0.0.0.0", port=0, make_pairs=str)
        self.assertIn("Whoever has this address", said.getvalue())

    def test_the_policy_names_what_is_in_the_page(self):
        page, policy = read_page()
        self.assertEqual(len(re.findall(r"'sha256-[\w+/=]{44}'", policy)), 2)
        self.assertLess(len(page), 80_000)


if __name__ == "__main__":
    unittest.main()
