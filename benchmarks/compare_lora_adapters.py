# Copyright © 2026 MLX Contributors

"""Train seeded ``mlx_lm.lora`` runs on plain and on patched mlx-lm and compare.

The model is a tiny random llama, the data a few lines, both made here. The
adapters of the two runs must be equal byte for byte, or the status is 1.

    python benchmarks/compare_lora_adapters.py \\
        --plain /path/to/plain/bin/python --patched "$(which python)"
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
}
# Builds the model with the plain interpreter; both runs then load the same files.
MAKE_MODEL = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
mx.random.seed(7)
model = llama.Model(llama.ModelArgs.from_dict(config))
mx.save_safetensors(
    str(folder / "model.safetensors"),
    dict(tree_flatten(model.parameters())),
    metadata={"format": "mlx"},
)
vocabulary = {"<s>": 0, "</s>": 1, **{chr(c): c - 30 for c in range(32, 126)}}
tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="</s>"))
template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token="<s>",
    eos_token="</s>",
    chat_template=template + "{% if add_generation_prompt %}a:{% endif %}",
).save_pretrained(folder)
"""
# Plain mlx-lm has no dpo: these are for two environments that both have it.
DPO_RUNS = {
    "dpo": ["--fine-tune-type", "lora"],
    "dpo, dora": ["--fine-tune-type", "dora", "--grad-checkpoint"],
    "dpo, full": ["--fine-tune-type", "full", "--optimizer", "adamw"],
    "dpo, accumulated": ["--grad-accumulation-steps", "2", "--warmup-steps", "3"],
    "dpo, packed": ["--pack", "--save-best", "loss"],
    "tr-dpo": ["--sync-reference", "--sync-steps", "5"],
    "kto": ["--loss-type", "kto"],
}
# As "dpo", but ended after 12 steps and gone on with.
RESUMED = "dpo, resumed"
RUNS = {
    "lora": ["--fine-tune-type", "lora"],
    "dora": ["--fine-tune-type", "dora", "--grad-checkpoint"],
    "full": ["--fine-tune-type", "full", "--optimizer", "adamw"],
    "lora, accumulated": ["--grad-accumulation-steps", "2", "--mask-prompt"],
}


def make_inputs(python: str, folder: Path) -> None:
    """Write the model, its tokenizer and the data."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    call(python, "-c", MAKE_MODEL, str(folder / "model"))
    (folder / "data").mkdir()
    for split, count in (("train", 24), ("valid", 8)):
        rows = [
            {"prompt": f"What is {n} + {n}?", "completion": f" It is {2 * n}."}
            for n in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(text)
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " Why?"}
            for row in rows
        ]
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (folder / "pairs").mkdir(exist_ok=True)
        (folder / "pairs" / f"{split}.jsonl").write_text(text)
        labels = [{**row, "label": n % 3 > 0} for n, row in enumerate(rows)]
        text = "".join(json.dumps(row) + "\n" for row in labels)
        (folder / "labels").mkdir(exist_ok=True)
        (folder / "labels" / f"{split}.jsonl").write_text(text)


def call(python: str, *arguments: str, **variables: str) -> str:
    """Run an interpreter away from this tree, so that its own mlx-lm is used."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= variables
    result = subprocess.run(
        [os.path.abspath(python), *arguments],
        cwd=tempfile.gettempdir(),
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"{python} failed:\n{result.stdout}{result.stderr}")
    return result.stdout.strip()


def train(
    python: str, folder: Path, out: Path, options: list[str], command: str = "lora"
) -> str:
    """Train, and return the SHA-256 of the adapter."""
    data = folder / ("data" if command == "lora" else "pairs")
    if "kto" in options:
        data = folder / "labels"
    flags = ["--model", folder / "model", "--data", data, "--train"]
    flags += ["--adapter-path", out, "--iters", 20, "--batch-size", 4, "--seed", 3]
    flags += ["--num-layers", 2, "--learning-rate", 1e-3, "--steps-per-eval", 10]
    # A reference that an earlier run left in the cache is another computation.
    cache = str(out.with_name(f"{out.name} cache"))
    run = ["-m", "mlx_lm", command, *map(str, flags), *options]
    call(python, *run, XDG_CACHE_HOME=cache)
    if out.name.startswith(RESUMED):
        more = ["--resume", str(out), "--iters", "20"]
        call(python, "-m", "mlx_lm", command, *more, XDG_CACHE_HOME=cache)
    return hashlib.sha256((out / "adapters.safetensors").read_bytes()).hexdigest()


def compare(pythons: tuple[str, str], folder: Path, dpo: bool) -> list[tuple[str, ...]]:
    """Train every kind of run in two environments; list both hashes of each."""
    make_inputs(pythons[0], folder)
    runs = [("lora", name, options) for name, options in RUNS.items()]
    if dpo:
        runs += [("dpo", name, options) for name, options in DPO_RUNS.items()]
        runs.append(("dpo", RESUMED, ["--iters", "12"]))
    return [
        (
            name,
            *(
                train(python, folder, folder / f"{name} {i}", options, command)
                for i, python in enumerate(pythons)
            ),
        )
        for command, name, options in runs
    ]


def main() -> None:
    """Compare the adapters of every kind of run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", required=True, help="Python with plain mlx-lm.")
    parser.add_argument("--patched", default=sys.executable, help="Python with DPO.")
    args = parser.parse_args()

    ask = "import mlx_lm; print(mlx_lm.__version__)"
    versions = [call(python, "-c", ask) for python in (args.plain, args.patched)]
    if "+dpo." in versions[0] or "+dpo." not in versions[1]:
        raise SystemExit(f"Needs plain against patched, got {' and '.join(versions)}.")
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        rows = compare((args.plain, args.patched), Path(scratch), dpo=False)
    print(f"| run | {versions[0]} | {versions[1]} | same |")
    print("|---|---|---|---|")
    for name, plain, patched in rows:
        different += plain != patched
        same = "yes" if plain == patched else "**no**"
        print(f"| {name} | {plain[:16]} | {patched[:16]} | {same} |")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
