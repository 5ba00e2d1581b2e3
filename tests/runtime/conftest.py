"""Fixtures of the tests of packed weights."""

import pytest

from prunus.runtime.kernels import library as kernels


@pytest.fixture(params=["best", "off"])
def _engine(request, monkeypatch):
    """Once with the kernels, once in torch alone."""
    if request.param == "off":
        monkeypatch.setenv("PRUNUS_ISA", "off")
    elif kernels.load() is None:
        pytest.skip(f"no kernels: {kernels.why_not()}")
