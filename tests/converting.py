"""`grpo-mega convert` on a test's ranks."""

from __future__ import annotations

import contextlib
import io

import torch


def commands(several):
    """On a rank: (exit code, what was printed) of each command."""
    from grpo_mega import cli
    from grpo_mega.parallel import mesh

    answers = []
    for arguments in several:
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            code = cli.run(["convert", *map(str, arguments)])
        if torch.distributed.is_initialized():  # a refusal leaves that to the process' end
            mesh.shutdown()
        answers.append((code, heard.getvalue()))
    return answers
