# Copyright © 2026 MLX Contributors

"""A token in the settings is used, and neither written nor shown."""

import json
import unittest
from unittest import mock

import datasets
from test_dpo_command import CommandCase, command, write_yaml
from tiny import HAS_MATPLOTLIB, ROWS

from mlx_lm.preference.data.secrets import hide_values, without_secrets

TOKEN = "hf_AbCdEfGhIjKl"
CONFIG = {
    "token": TOKEN,
    "name": "default",
    "storage_options": {"key": "AKIA-KEY", "secret": "S3-SECRET"},
    "data_files": [f"https://me:{TOKEN}@host/a.json", f"s3://host/b.json?sig={TOKEN}"],
}


class TestSecrets(CommandCase):
    def run_with(self, config, *more):
        """The command on a data set of the Hub, and what that was asked for."""
        file = write_yaml(
            self.folder / "dpo.yaml", hf_dataset={"path": "org/pairs", "config": config}
        )
        rows = datasets.Dataset.from_list(ROWS)
        given = []

        def load(path, **kwargs):
            given.append(kwargs)
            return datasets.DatasetDict(train=rows, validation=rows, test=rows)

        flags = self.flags("--test", "-c", file, *more)
        place = flags.index("--data")
        del flags[place : place + 2]
        with mock.patch.object(datasets, "load_dataset", load):
            return *command(*flags), given

    def written(self):
        files = (p for p in self.adapters.rglob("*") if p.is_file())
        return b"".join(path.read_bytes() for path in files)

    @unittest.skipUnless(HAS_MATPLOTLIB, "needs matplotlib")
    def test_used_and_not_kept(self):
        code, out, err, given = self.run_with(CONFIG, "--report")
        self.assertEqual((code, given), (0, [CONFIG]), err)
        said = out + err
        for secret in (TOKEN, "AKIA-KEY", "S3-SECRET"):
            self.assertNotIn(secret, said)
            self.assertNotIn(secret.encode(), self.written())
        self.assertIn("Not saved: data_files, storage_options, token of hf_dat", said)
        saved = json.loads((self.adapters / "adapter_config.json").read_text())
        self.assertEqual(saved["hf_dataset"]["config"]["name"], "default")
        # Given again, the run goes on; and nothing says what it was given.
        code, out, err, given = self.run_with(CONFIG, "--resume", self.adapters)
        self.assertEqual((code, given), (0, [CONFIG]), err)
        self.assertNotIn(TOKEN, out + err)

    def test_errors(self):
        with mock.patch.object(
            datasets, "load_dataset", side_effect=ValueError(f"401 {TOKEN} x://a:b@c")
        ):
            file = write_yaml(
                self.folder / "dpo.yaml",
                hf_dataset={"path": "org/pairs", "config": {"token": TOKEN}},
            )
            code, out, err = command("--train", "--model", self.model, "-c", file)
        self.assertEqual(
            (code, err), (2, "Error: Can't load org/pairs: 401 *** x://***@c\n")
        )
        self.assertNotIn(TOKEN, out)


class TestNames(unittest.TestCase):
    def test_what_is_one(self):
        secret = "token use_auth_token api_key apikey password aws_secret_access_key "
        secret += "account_key HF_TOKEN sas_token private-key credentials cookies key"
        for name in secret.split():
            kept, found = without_secrets({"path": "a", "config": {name: "s3cret"}})
            self.assertEqual((kept["config"], found), ({}, {name: "s3cret"}), name)
            self.assertEqual(hide_values("a s3cret", {name: "s3cret"}), "a ***")
        plain = {"name": "a", "token": True, "data_dir": "keys", "tokenized": "b"}
        plain |= {"data_files": ["a/b?c", "x://host/a"], "monkey": "c", "author": "d"}
        both = {"path": "token", "prompt_feature": "key", "config": plain}
        for given in (both, [both], None, "org/name"):
            self.assertEqual(without_secrets(given), (given, {}))


if __name__ == "__main__":
    unittest.main()
