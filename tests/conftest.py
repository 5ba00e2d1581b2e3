"""Fixtures for the whole test suite."""

import gc
import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Several processes share the tests. Each uses its part of the cores, because more threads than
# cores would wait for one another. This must happen before torch is imported, and the processes
# that tests start inherit it.
if _workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

# A folder of data that a developer has set must not decide what tests read.
os.environ.pop("PRUNUS_DATA", None)

import pytest

import pretend_cuda

if pretend_cuda.INSTALLED in os.environ:
    pretend_cuda.install()

ROOT = Path(__file__).resolve().parent.parent

#: What takes longest: a server with all tests that ask it, and files. They start first, so that no
#: process waits for one at the end.
SLOW = (
    "script_server.py", "hardware/test_pretend_cuda.py", "pruning/test_golden.py",
    "docs/test_tutorials.py", "cli/test_cli.py", "pruning/test_families.py",
    "reporting/test_browser.py", "methods/test_methods_golden.py", "pruning/test_experts.py",
    "hardware/test_processors.py", "sweeping/test_sweep.py", "evaluation/test_tasks.py",
    "structure/test_repair.py",
)  # fmt: skip


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data: PRUNUS_SHARED, by default `../shared` beside the repository."""
    folder = Path(os.environ.get("PRUNUS_SHARED", "../shared"))
    folder = folder if folder.is_absolute() else ROOT / folder
    if not (folder / "golden").is_dir():
        pytest.skip(
            f"no reference data at {folder}; set PRUNUS_SHARED to the folder with golden/ and data/"
        )
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Two real Llama blocks and what the original code made of them."""
    return shared / "golden" / "smollm2_two_blocks"


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    """The local mirror of WikiText-2, C4 and the zero-shot tasks."""
    return shared / "data"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; a test that needs it skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = filter(None, map(shutil.which, names))
    program = os.environ.get("PRUNUS_CHROMIUM") or next(found, None)
    if program is None:
        pytest.skip(
            "no Chromium: install it (Debian: apt install chromium) or name it in PRUNUS_CHROMIUM"
        )
    # Chromium's sandbox does not work for root, who only runs tests in containers.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=options)
        yield running
        running.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    from tiny import seed_torch

    seed_torch(0)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A tiny Llama in the folder of the test. Files that need another model have their own."""
    from tiny import tiny_checkpoint

    return tiny_checkpoint(tmp_path / "dense")


@pytest.fixture
def interruptible():
    """A test and the processes that it starts end on Ctrl-C, even if this one is a background job.

    A shell's background jobs ignore Ctrl-C, and so do the processes that they start.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def uninstalled(monkeypatch):
    """A function after whose call some libraries count as not installed."""
    find = importlib.util.find_spec

    def hide(*names: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name in names else find(name, *a)
        )

    return hide


@pytest.fixture(scope="module")
def short_python_texts() -> Iterator[None]:
    """`python-docs` and `python-code` are their beginnings: all takes a second to tokenise."""
    from prunus.calibration import corpora

    docs, modules = cache(corpora.python_docs), cache(corpora._library_modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "python_docs", lambda part: docs(part)[:50])
        patch.setattr(corpora, "_library_modules", modules)
        patch.setattr(
            corpora,
            "python_code",
            lambda part: [path.read_text(encoding="utf-8")[:999] for path in modules(part)[:40]],
        )
        yield


@pytest.fixture
def exact_products(monkeypatch) -> None:
    """Measurements of loss keep products in float32, whatever the processor has."""
    from prunus.rounding import loss_sensitivity

    monkeypatch.setattr(loss_sensitivity, "multiplies_bfloat16", lambda device: False)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Calls of fsync return at once: what they promise is for power cuts, and no test makes one.

    This holds in the process of the tests, and in forks of `script_server.py`. Programs that tests
    start call the real fsync.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device; hardware/test_pretend_cuda.py runs it on a pretend one")


def pytest_collection() -> None:
    """While libraries are imported, nothing is garbage."""
    gc.disable()


@cache
def _unit(file: Path) -> str:
    """The tests of one unit run in one process: those that ask the server, or those of a file.

    The server imports torch, which takes longer than most tests. So it starts once.
    """
    text = file.read_text(encoding="utf-8")
    if "from scripts import" in text:
        return "script_server.py"
    return file.relative_to(ROOT / "tests").as_posix()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a process takes a unit at a time, in place of a file."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class UnitScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(ROOT / super()._split_scope(nodeid))

    return UnitScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    turns = {unit: turn for turn, unit in enumerate(SLOW)}
    items.sort(key=lambda item: turns.get(_unit(item.path), len(turns)))


def pytest_collection_finish() -> None:
    """Garbage is looked for among what tests make, not in a million objects of libraries."""
    gc.collect()
    gc.freeze()
    gc.enable()
