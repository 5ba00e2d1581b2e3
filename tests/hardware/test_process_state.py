"""What belongs to the whole process comes back, however the threads that replace it overlap."""

import logging
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch import nn
from transformers import modeling_utils

import prunus
from prunus.engine.linear_command import _one_processor_thread
from prunus.formats.gguf.package import package
from prunus.hardware.numerics import tf32_products
from prunus.hardware.process_state import no_stderr, no_warnings
from prunus.model.meta_model import limited_modules
from tiny_tokenizer import dense_checkpoint

#: What replaces something -> what reads it.
CONTEXTS = {
    no_warnings: lambda: list(warnings.filters),
    no_stderr: lambda: sys.stderr,
    tf32_products: lambda: torch.backends.cuda.matmul.fp32_precision,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_overlaps_is_active_to_the_end_and_then_put_back(context):
    read = CONTEXTS[context]
    before = read()
    first, second = context(), context()
    first.__enter__()
    active = read()
    second.__enter__()
    first.__exit__(None, None, None)
    assert active != before and type(read()) is type(active)
    assert read() != before
    second.__exit__(None, None, None)
    assert read() == before


def test_what_is_not_asked_for_changes_nothing_that_another_thread_has_set():
    read = CONTEXTS[tf32_products]
    before = read()
    active = tf32_products()
    active.__enter__()
    with tf32_products(False):
        active.__exit__(None, None, None)
    assert read() == before


def test_two_threads_load_models_at_the_same_time(tmp_path, monkeypatch):
    """The first begins before the second, and ends while the second still loads."""
    folder = dense_checkpoint(tmp_path / "model")
    before, load = modeling_utils.safe_open, transformers.LlamaForCausalLM.from_pretrained
    second_began, first_ended = threading.Event(), threading.Event()

    def from_pretrained(*arguments, **options):
        if threading.current_thread().name == "second":
            second_began.set()
            assert first_ended.wait(60)
        else:
            assert second_began.wait(60)
        return load(*arguments, **options)

    def load_second():
        threading.current_thread().name = "second"
        return prunus.load(folder).model

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(lambda: prunus.load(folder).model)
        second = pool.submit(load_second)
        expected = first.result()
        first_ended.set()
        assert second.result().config.to_dict() == expected.config.to_dict()
    assert modeling_utils.safe_open is before


def processor_threads() -> int:
    """The number of a thread that has computed nothing yet."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(torch.get_num_threads).result()


def test_one_thread_at_a_time_where_threads_cannot_share():
    before, inside, leaves = processor_threads(), threading.Event(), threading.Event()

    def enter():
        with _one_processor_thread():
            inside.set()
            assert leaves.wait(60)

    with ThreadPoolExecutor() as pool:
        with _one_processor_thread():
            second = pool.submit(enter)
            # It cannot enter, so the wait is in vain. A thread that could enter would leave last.
            assert not inside.wait(0.2)
        leaves.set()
        second.result()
    assert processor_threads() == before


def test_modules_of_other_threads_do_not_count(monkeypatch):
    monkeypatch.setattr("prunus.model.meta_model._MAX_MODULES", 2)
    with limited_modules(), ThreadPoolExecutor() as pool:
        other = pool.submit(lambda: nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))).result()
        with pytest.raises(ValueError, match="more than 2 modules"):
            nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))
    assert len(other) == 5


def test_the_logger_of_the_package_gguf_keeps_its_level():
    pytest.importorskip("gguf")
    level = logging.getLogger("gguf").level
    assert package().GGMLQuantizationType.F32 == 0
    assert logging.getLogger("gguf").level == level
