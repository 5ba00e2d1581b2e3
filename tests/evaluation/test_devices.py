"""Models are evaluated on a CUDA device as on the processor."""

import dataclasses
from pathlib import Path

import pytest
import torch

import prunus
from devices import PRETEND
from prunus.evaluation.model_input import ComputeOptions
from prunus.evaluation.streamed_model import StreamedModel
from prunus.model.open_folder import OpenFolder
from prunus.model.stream import StatesPlace

pytestmark = pytest.mark.cuda


def score(folders, device, **options):
    arguments = {"seqlen": 24, "batch": 2, "reference": folders / "dense"}
    ids = str(folders / "ids.safetensors")
    found = prunus.perplexity(folders / "pruned", ids, device=device, **(arguments | options))
    return dataclasses.replace(found, seconds=0)


def assert_same(expected, found):
    if PRETEND:
        assert found == expected
    else:
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_perplexity_and_divergence(folders, stream):
    assert_same(score(folders, "cpu", stream=stream), score(folders, "cuda:0", stream=stream))


@pytest.mark.parametrize(
    "place", [StatesPlace(None, False), StatesPlace(Path(), True)], ids=["host memory", "file"]
)
def test_where_hidden_states_wait_changes_nothing(folders, place, monkeypatch, tmp_path):
    expected = score(folders, "cuda:0", stream=True)
    if place.spill_to is not None:
        place = dataclasses.replace(place, spill_to=tmp_path)
    monkeypatch.setattr(StreamedModel, "_place_states", lambda *_: place)
    assert_same(expected, score(folders, "cuda:0", stream=True))


def test_states_that_do_not_fit_on_the_device_wait_in_host_memory(folders, monkeypatch):
    model = StreamedModel(
        OpenFolder(folders / "dense"), ComputeOptions("auto", torch.device("cuda"))
    )
    shape = torch.Size((5, 24))
    for free, host, place in (
        (10**9, 10**9, StatesPlace(None, True)),
        (10**6, 10**9, StatesPlace(None, False)),
        (10**6, 10**3, None),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, free))
        monkeypatch.setattr(
            "prunus.evaluation.streamed_model.available_memory", lambda host=host: host
        )
        monkeypatch.setattr(StreamedModel, "_needs", lambda *_: (10**3, 10**7))
        found = model._place_states(1, shape, 1)
        assert found == place or (place is None and found.spill_to is not None)
