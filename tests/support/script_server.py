"""A process with one thread that has imported torch and prunus, and forks for every script.

Importing them takes three seconds, and tests start a script of this folder ten times. A request is
one line of JSON on the standard input: the script, its arguments, its environment, and the files
that take what it prints. The answer is one line with its exit status.
"""

import gc
import json
import os
import runpy
import sys
import threading
import traceback
from typing import Any

import torch

torch.set_num_threads(1)
gc.disable()  # while libraries are imported, because nothing of them is garbage

import transformers.models.llama.modeling_llama  # noqa: E402, F401

import prunus  # noqa: E402
import prunus.sweeping.sweep  # noqa: E402

# Scripts die by signals, not by power cuts, so they do not wait for the disk either; see conftest.
os.fsync = lambda _handle: None

# Their modules are imported when they are first asked for.
_ = prunus.prune, prunus.recover, prunus.perplexity
gc.freeze()
gc.enable()


def _status(request: dict[str, Any]) -> int:
    """Run a script here, as Python would; returns its exit status."""
    for number, name in ((1, "out"), (2, "errors")):
        file = os.open(request[name], os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ |= request["environment"]
    sys.argv = [request["script"], *request["arguments"]]
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or 0
        print(exit_.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    assert threading.active_count() == 1
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in requests:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = _status(json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    main()
