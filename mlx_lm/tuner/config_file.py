# Copyright © 2026 MLX Contributors

"""Settings as a YAML file holds them."""

from pathlib import Path
from typing import Any

import yaml


def read_config(path: str | Path, loader: Any) -> dict[str, Any]:
    """
    Read a YAML file of settings.

    Args:
        path (str or Path): The file.
        loader (type): PyYAML's loader to use.

    Returns:
        dict: The settings.

    Raises:
        ValueError: If it can't be read or holds something else; the message has
            line and column.

    Example:
        >>> read_config("nowhere.yaml", yaml.SafeLoader)
        Traceback (most recent call last):
        ...
        ValueError: Can't read the configuration nowhere.yaml: No such file or \
directory.
    """
    try:
        config = yaml.load(Path(path).read_bytes().decode("utf-8"), loader) or {}
    except OSError as e:
        raise ValueError(f"Can't read the configuration {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: invalid UTF-8. Save it as UTF-8.") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise ValueError(
            f"{place}: {getattr(e, 'problem', None) or e}. Text with special "
            "characters needs quotes."
        ) from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"Can't read the configuration {path}: {e}.") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold keys and values.")
    return config
