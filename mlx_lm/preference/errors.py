# Copyright © 2026 MLX Contributors

"""What a user can mend. Any other exception is a bug and keeps its traceback."""


class InputError(ValueError):
    """Unusable settings, data, models or files: what is wrong, where, what to do."""
