"""`grpo-mega convert` on a test's ranks."""

from __future__ import annotations

import contextlib
import io


def commands(several):
    """On a rank: (exit code, what was printed) of each command."""
    from grpo_mega import cli

    answers = []
    for arguments in several:
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            code = cli.run(["convert", *map(str, arguments)])
        answers.append((code, heard.getvalue()))
    return answers
