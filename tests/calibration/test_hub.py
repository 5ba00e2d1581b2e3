"""Corpora from the hub, where there may be no network."""

import io

import pytest

from prunus.calibration.corpora import load_corpus

datasets = pytest.importorskip("datasets")


def refuse(_address, timeout):
    assert timeout <= 5
    raise OSError("unreachable")


@pytest.mark.parametrize(
    ("proxies", "connect", "offline"),
    [
        ({}, refuse, True),
        ({}, lambda _address, _timeout: io.BytesIO(), False),
        # Behind a proxy no connection is tried.
        ({"https": "http://proxy:1"}, pytest.fail, False),
    ],
)
def test_a_hub_that_cannot_be_reached_is_not_asked_again(proxies, connect, offline, monkeypatch):
    seen = []

    def load_dataset(**_):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.delenv("PRUNUS_DATA", raising=False)
    message = r"c4 could not be loaded .*no route .* need no network: python-docs, .*PRUNUS_DATA"
    with pytest.raises(OSError, match=message):
        load_corpus("c4", "calibration", None)
    assert seen == [offline]
    assert datasets.config.HF_HUB_OFFLINE is False, "as it was"
