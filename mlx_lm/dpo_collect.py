# Copyright © 2026 MLX Contributors

import argparse
import os
import shlex
import sys
from types import SimpleNamespace

from .preference.collect.flags import FLAGS, GROUPS
from .preference.device import prepare_backend
from .preference.errors import InputError
from .preference.files import user_cache_folder
from .preference.setting import add_flag
from .preference.terminal import lasting_output, rprint, visible


def build_parser() -> argparse.ArgumentParser:
    """The command line; all values default to None."""
    parser = argparse.ArgumentParser(
        description="Collect preferences: generate answers, label them, make pairs.",
        allow_abbrev=False,
    )
    parser.error = _refuse_flags  # type: ignore[method-assign]
    for title, settings in GROUPS.items():
        group = parser.add_argument_group(title)
        for one in settings:
            add_flag(group, one)
    return parser


def _refuse_flags(message):
    raise InputError(f"{message}. See mlx_lm.dpo_collect --help.")


def resolve_args(argv: list[str] | None = None) -> SimpleNamespace:
    """Merge command line and defaults, and check them; ``explicit`` lists what was given."""
    flags = vars(build_parser().parse_args(argv))
    given = {k: v for k, v in flags.items() if v is not None}
    for name, value in given.items():
        FLAGS[name].check(value)
    defaults = {name: one.default for name, one in FLAGS.items()}
    return SimpleNamespace(**{**defaults, **given}, explicit=set(given))


def run(args: SimpleNamespace) -> None:
    """Do what the settings ask for: generate, label, make pairs, export."""
    if not args.output:
        raise InputError("Name the folder of what is collected: --output DIR.")
    steps = "prompts", "label", "export"
    asked = [name for name in steps if getattr(args, name) is not None]
    if not asked and args.explicit & {"pairs", "weights", "length_penalty"}:
        asked = ["pairs"]
    if not asked:
        raise InputError(
            f"Nothing to do for {args.output}: give --prompts FILE to generate, "
            "--label JUDGE to label, --pairs KIND to make pairs, or --export FILE."
        )
    from .preference.collect.pairs import check_own

    judge = (args.label or "").removeprefix("function:").rpartition(":")[0]
    check_own(args.output, args.export, *filter(None, [args.prompts, judge]))
    if "prompts" in asked:
        if args.label is not None:
            from .preference.collect.judges import check_judge

            check_judge(args.label)
        _generate(args)
    if "label" in asked:
        _label(args)
    if "pairs" in asked:
        _make_pairs(args)
    if "export" in asked:
        _export(args)


# Imported when they are needed: a page needs no model, and a judge no page.


def _generate(args):
    from .preference.collect.generate import Sampling, generate_answers

    if args.model is None:
        raise InputError("Name the model that answers: --model.")
    generate_answers(
        args.output,
        args.prompts,
        args.model,
        args.adapter_path,
        sampling=Sampling(**{f: getattr(args, f) for f in Sampling.__annotations__}),
        another_model=args.another_model,
        max_bad_rows=args.max_bad_rows,
        trust_remote_code=args.trust_remote_code,
    )
    if args.label is None and args.samples > 1:
        command = f"--label human --model {shlex.quote(args.model)}"
        rprint(
            f"Judge them on a page with\n  mlx_lm.dpo_collect {command} --output "
            f"{shlex.quote(args.output)}"
        )


def _label(args):
    kind, _, name = args.label.partition(":")
    if kind == "human":
        from .preference.collect.server import label_by_hand

        # Another start has the same page and the same pairs.
        own = ("model", "host", "port", *_how(args))
        words = [(k, str(getattr(args, k))) for k in own if k in args.explicit]
        more = [f" --{k.replace('_', '-')} {shlex.quote(x)}" for k, x in words]
        label_by_hand(
            args.output,
            name,
            host=args.host,
            port=args.port,
            review=args.review,
            model=args.model,
            browse=not args.no_browser,
            go_on="".join(more),
            train=" --weight-feature weight" * bool(args.weights),
            make_pairs=lambda: _make_pairs(args),
        )
    else:
        from .preference.collect.judges import label_answers

        label_answers(
            args.output,
            args.label,
            longest=args.judge_timeout,
            model=args.model,
            adapter_path=args.adapter_path,
            trust_remote_code=args.trust_remote_code,
        )
        _make_pairs(args)


def _make_pairs(args):
    from .preference.collect.pairs import write_pairs

    return write_pairs(args.output, **_how(args))


def _export(args):
    from .preference.collect.pairs import export_pairs

    export_pairs(args.output, args.export, **_how(args))


def _how(args):
    """Which pairs are made, and what they weigh."""
    return {
        name: getattr(args, name) for name in ("pairs", "weights", "length_penalty")
    }


def main() -> None:
    """The command ``mlx_lm.dpo_collect``."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    prepare_backend(user_cache_folder("kernels"))
    with lasting_output():
        try:
            run(resolve_args())
        except KeyboardInterrupt:
            sys.exit(_one_line("interrupted; the same command goes on.", 130))
        except InputError as e:
            if os.environ.get("MLX_LM_DEBUG"):
                raise
            sys.exit(_one_line(e, 2))


def _one_line(error, code):
    print(f"Error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
