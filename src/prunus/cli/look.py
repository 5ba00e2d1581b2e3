"""Verbs that look at a checkpoint or at this machine: `inspect` and `doctor`."""

from __future__ import annotations

from typing import Annotated, Any

from prunus.cli import arguments as arg
from prunus.cli.flags import opt, with_flags
from prunus.cli.terminal import print_result, print_text, user_errors, write_json
from prunus.runs.options import RunOptions


@with_flags(RunOptions, only=("trust_remote_code",))
def inspect(
    model: arg.Model,
    *,
    verify: Annotated[
        bool,
        opt(
            "First compare every shard with the SHA-256 in the record of the run that wrote it.",
            names=("--verify",),
        ),
    ] = False,
    json_file: arg.Json = None,
    **options: Any,
) -> None:
    """Show shape, dtype, sparsity and N:M patterns of every linear."""
    with user_errors(json_file):
        from prunus.evaluation.inspection import inspect as inspect_checkpoint

        found = inspect_checkpoint(
            model, trust_remote_code=bool(options["trust_remote_code"]), verify=verify
        )
        print_result(found.table(), json_file, found.as_dict())


def doctor(json_file: arg.Json = None) -> None:
    """Show which kernels run packed models here, and why."""
    with user_errors(json_file):
        from prunus.packed.doctor import describe, in_sentences

        state = describe()
        write_json(json_file, state)
        for sentence in in_sentences(state):
            print_text(f"{sentence}\n", json_file)
