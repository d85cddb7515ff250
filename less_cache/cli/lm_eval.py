"""``less-cache lm-eval``: lm-evaluation-harness, which then knows the model ``less-cache``."""

from __future__ import annotations

import sys

import typer

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Every option is lm_eval's, ``--help`` as well."""


def lm_eval(context: typer.Context) -> None:
    """Run lm_eval with the model less-cache: all arguments are lm_eval's.

    less-cache lm-eval --model less-cache --model_args pretrained=M,cache=FOLDER --tasks piqa
    """
    # Loading it registers the model.
    from ..integrations import lm_eval as registered

    registered.run_command([f"{sys.argv[0]} lm-eval", *context.args])
