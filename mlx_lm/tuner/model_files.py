# Copyright © 2026 MLX Contributors

"""What is wrong with the files of a model that can't be loaded."""

import json
from pathlib import Path


def explain_failure(path: str, error: Exception) -> str:
    """
    Look for the reason in a model's folder, since loaders seldom name a file.

    Args:
        path (str): A local folder, or a Hugging Face repo.
        error (Exception): What the loader raised.

    Returns:
        str: What is missing or damaged and what to do, else the error's text.

    Example:
        >>> explain_failure("org/model", OSError("No connection"))
        'No connection'
    """
    folder = Path(path)
    if not folder.is_dir():
        return str(error)
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError as e:
            return f"{file.name} is damaged ({e}). Copy it again."
    if not (folder / "config.json").exists():
        return "it has no config.json. Give the folder of a whole model."
    if not any(folder.glob("*token*.*")):
        return (
            "it has no tokenizer (tokenizer.json or tokenizer.model). Copy the "
            "tokenizer's files of the model that it was made from."
        )
    kind = f"{type(error).__name__}: " if isinstance(error, LookupError) else ""
    return f"{kind}{error}"
