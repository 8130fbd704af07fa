# Copyright © 2026 MLX Contributors

"""Where token ids are kept for later runs."""

from collections.abc import Iterable
from typing import Any

from ..features import Feature
from ..setting import Setting


class _Tokens(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        what = (
            "Folder that keeps the token ids of large data sets for later runs. "
            "Default: in the user's cache folder; false: nowhere."
        )
        marks: dict[str, Any] = {"kind": str, "resume": "free", "per_rank": True}
        marks |= {"outside": True, "off": True, "metavar": "DIR"}
        return {"Rows and pairs": [Setting("token_cache", None, what, **marks)]}

    def rows(self, args: Any) -> dict[str, Any]:
        return {"token_cache": args.token_cache}


FEATURE = _Tokens()
