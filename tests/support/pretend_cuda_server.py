"""The process with pretend CUDA devices: runs the tests that it is asked for; see the plugin.

A request is one line of JSON on the standard input. Every report is one line on the standard
output. What the tests print goes to the standard error.
"""

import json
import os
import sys
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parent))

import pretend_cuda

pretend_cuda.load()

import pytest  # noqa: E402

pretend_cuda.install()


class _Reporter:
    """A plugin of pytest that writes every report as a line."""

    def __init__(self, to: IO[str]) -> None:
        self._to = to

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        print(json.dumps(data), file=self._to, flush=True)


def main() -> None:
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        os.chdir(request["root"])
        options = ["--rootdir", request["root"], "-m", "", "-p", "no:cacheprovider"]
        status = pytest.main([*options, *request["tests"]], plugins=[_Reporter(reports)])
        # Any other status means that some tests were not run and have no reports.
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit(f"pytest ended with {status!r}")


if __name__ == "__main__":
    main()
