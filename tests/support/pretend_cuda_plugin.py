"""Runs tests marked `cuda` on pretend devices, in a process of their own, and reports them here.

A pretend device changes torch for its whole process, so the process that runs all other tests must
not have one. When the first marked test of a file is due, the plugin sends the names of all marked
tests of that file to `pretend_cuda_server.py`. The reports come back one by one, and every test
appears as if it had run here. One server serves all files.

Where a real CUDA device is there, marked tests run on it as all other tests do.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from typing import IO, Any

import pytest

import pretend_cuda
from places import SUPPORT


@cache
def _why_not() -> str | None:
    return pretend_cuda.why_not()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Let the server run a marked test, and report what it says."""
    pretends = pretend_cuda.INSTALLED in os.environ
    if item.get_closest_marker("gpu") and (pretends or not _has_cuda()):
        item.add_marker(pytest.mark.skip(reason="needs a real CUDA device"))
    if not _goes_to_server(item):
        return None
    if reason := _why_not():
        item.add_marker(pytest.mark.skip(reason=f"no CUDA device, and {reason}"))
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _server().reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # Nothing was set up here, but modules and folders that earlier tests left for this one end.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if _server.cache_info().currsize:
        _server().close()


def _has_cuda() -> bool:
    import torch  # The process that only hands out tests never needs it.

    return torch.cuda.is_available()


def _goes_to_server(item: pytest.Item) -> bool:
    return item.get_closest_marker("cuda") is not None and not _has_cuda()


@cache
def _server() -> "_Server":
    return _Server()


class _Server:
    """The process that has pretend devices, seen from the process that has none."""

    def __init__(self) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")
        }
        self._process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "pretend_cuda_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=kept | {pretend_cuda.INSTALLED: "1", "OMP_NUM_THREADS": "1"},
            text=True,
        )
        # Reports that have come, by test, and the tests that were asked for.
        self._reports: dict[str, list[Any]] = {}
        self._asked: set[str] = set()

    def reports_of(self, item: pytest.Item) -> list[Any]:
        if item.nodeid not in self._asked:
            self._ask(item)
        while not self._is_done(item.nodeid):
            line = self._process.stdout.readline()
            if not line:
                return [self._failure(item)]
            data = json.loads(line)
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            self._reports.setdefault(report.nodeid, []).append(report)
        return self._reports.pop(item.nodeid)

    def _ask(self, item: pytest.Item) -> None:
        same_file = [
            other.nodeid
            for other in item.session.items
            if other.path == item.path and _goes_to_server(other)
        ]
        self._asked.update(same_file)
        request = {"root": str(item.config.rootpath), "tests": same_file}
        # If the process has ended, reading its reports ends too, and says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _is_done(self, name: str) -> bool:
        return any(report.when == "teardown" for report in self._reports.get(name, ()))

    def _failure(self, item: pytest.Item) -> pytest.TestReport:
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")[-5000:]
        return pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={},
            outcome="failed",
            longrepr=f"the process with the pretend device has ended:\n{text}",
            when="call",
        )

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)
        self._errors.close()
