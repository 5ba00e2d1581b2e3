"""Corpora from the hub, where there is no network."""

from __future__ import annotations

import pytest

from prunus.calibration import hub
from prunus.calibration.corpora import load_corpus

datasets = pytest.importorskip("datasets")


@pytest.fixture
def offline_seen(monkeypatch):
    """What the library was told about the network, each time that it was asked for a data set."""
    seen = []

    def load_dataset(**_):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.delenv("PRUNUS_DATA", raising=False)
    return seen


def test_without_a_network_nothing_is_tried_again_and_the_message_names_other_sources(
    offline_seen, monkeypatch
):
    def refuse(_address, timeout):
        assert timeout <= 5
        raise OSError("unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(OSError, match=r"need no network: python-docs, .*file.*self.*PRUNUS_DATA"):
        load_corpus("c4", "calibration", None)
    assert offline_seen == [True]
    assert datasets.config.HF_HUB_OFFLINE is False, "as it was"


def test_a_hub_that_answers_is_asked(offline_seen, monkeypatch):
    class Connection:
        def close(self):
            pass

    monkeypatch.setattr("socket.create_connection", lambda _address, _timeout: Connection())
    with pytest.raises(OSError, match="could not be loaded"):
        load_corpus("wikitext2", "calibration", None)
    assert offline_seen == [False]


def test_behind_a_proxy_no_connection_is_tried(offline_seen, monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:1"})
    monkeypatch.setattr("socket.create_connection", pytest.fail)
    assert hub._answers("https://example.org")
    with pytest.raises(OSError, match="could not be loaded"):
        load_corpus("ptb", "calibration", None)
    assert offline_seen == [False]
