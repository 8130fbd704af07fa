# Copyright © 2026 MLX Contributors

"""How long a run on a large set takes to its first step, and in how much memory.

Short made-up pairs, a toy model and the real command, in a process of its own:

    python benchmarks/start_benchmark.py --tokenizer SmolLM2-135M-Instruct --rows 1e6

Ten million pairs of 1.5 KB, of which the command reads as many as a run uses:

    python benchmarks/start_benchmark.py --rows 1e7 --words 85
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shapes import save_random_model

TOY = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
WORDS = (
    "a and answer bread city cold day down every far from garden go good green hand "
    "have in it keep large light many morning never night of often open river short "
    "sky so stone street sun take than that the time tree under walk water we when "
    "which wind with write year you"
).split()


def made_rows(count: int, kind: str, seed: int = 0, words: int = 14) -> Iterator[dict]:
    """Pairs of a few words each: texts, or messages."""
    draw = random.Random(seed)
    made = lambda: " ".join(draw.choices(WORDS, k=draw.randint(4, 2 * words - 4)))
    # Long texts take long to make: the same ones come again.
    pool = [made() for _ in range(5000)] if words > 14 else []
    text = (lambda: pool[int(draw.random() * len(pool))]) if pool else made
    for i in range(count):
        prompt, chosen, rejected = f"{i}: {text()}?", f" {text()}.", f" {text()}!"
        if kind == "text":
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            continue
        turn = lambda role, text: [{"role": role, "content": text.strip()}]
        answers = {"chosen": chosen, "rejected": rejected}
        told = {name: turn("assistant", text) for name, text in answers.items()}
        yield {"prompt": turn("user", prompt), **told}


def write_rows(path: Path, rows: Iterator[dict]) -> None:
    """Write a JSONL or a Parquet file, some rows at a time."""
    if path.suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    while part := [row for _, row in zip(range(20_000), rows)]:
        table = pa.Table.from_pylist(part)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def timed(command: list[str]) -> tuple[float, float, float, int]:
    """Seconds, processor seconds, peak GB and the exit code of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    lines = process.stdout.readlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print("".join(lines[-5:]), file=sys.stderr)
    unit = 1 if sys.platform == "darwin" else 1024
    took = time.perf_counter() - began
    cpu = usage.ru_utime + usage.ru_stime
    return took, cpu, usage.ru_maxrss * unit / 1e9, process.returncode


def main() -> None:
    """Print a row for each file, tree and state of the cache."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="A model folder.")
    parser.add_argument("--rows", type=float, default=1e5)
    parser.add_argument("--kinds", nargs="+", default=["chat"])
    parser.add_argument("--files", nargs="+", default=["jsonl"])
    parser.add_argument("--trees", nargs="+", default=[str(Path(__file__).parents[1])])
    parser.add_argument("--folder", type=Path, help="Keep the files here.")
    parser.add_argument("--words", type=int, default=14, help="Of a text, on average.")
    parser.add_argument("--read", type=int, help="Rows of them that the run reads.")
    parser.add_argument("--no-cache", action="store_true", help="Neither write it.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, args.folder or Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    """Run each tree in turns over each file, before and after the ids are kept."""
    count = int(args.rows)
    tokens = 4096
    if args.tokenizer:
        tokens = json.loads((args.tokenizer / "config.json").read_text())["vocab_size"]
    model = folder / "model"
    if not model.exists():
        save_random_model(
            model, {**TOY, "vocab_size": tokens}, tokenizer=args.tokenizer
        )
    print("| rows | file | tree | token ids | s | CPU s | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for kind in args.kinds:
        for suffix in args.files:
            data = folder / f"{kind}_{count}.{suffix}"
            if not data.exists():
                write_rows(data, made_rows(count, kind, words=args.words))
            for known in ("new",) if args.no_cache else ("new", "cached"):
                for number, tree in enumerate(args.trees):
                    run(args, folder, model, data, known, number, tree)


def run(args, folder, model, data, known, number, tree):
    """One run of one step."""
    cache = folder / f"cache_{number}"
    if known == "new":
        for file in cache.glob("*"):
            file.unlink()
    settings = {
        "model": str(model),
        "train": True,
        "data": str(data),
        "iters": 1,
        "adapter_path": str(folder / "adapters"),
        "num_layers": 1,
        "token_cache": False if args.no_cache else str(cache),
        "reference_cache": False,
        "val_batches": 1,
    }
    if args.read:
        settings["max_rows"] = args.read
    config = folder / "run.yaml"
    config.write_text(json.dumps(settings), "utf-8")
    os.environ["PYTHONPATH"] = tree
    # Not the tree that this is run in.
    command = [sys.executable, "-P", "-m", "mlx_lm.dpo", "--config", str(config)]
    took, cpu, peak, code = timed(command)
    facts = f"{took:.1f} | {cpu:.1f} | {peak:.2f}" if code == 0 else f"exit {code} | | "
    size = data.stat().st_size / 1e6
    print(
        f"| {int(args.rows):,} {data.stem.split('_')[0]} | {data.suffix[1:]}, "
        f"{size:,.0f} MB | {number} | {known} | {facts} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
