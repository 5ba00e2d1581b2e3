"""Whether the Hugging Face hub answers, asked before its libraries, which try again for minutes."""

from __future__ import annotations

import queue
import ssl
import threading
import time
import urllib.error
import urllib.request

from prunus.words import reason

# Seconds: the longest wait for an answer, and how long an answer holds.
_WAIT, _HOLDS = 8.0, 60.0
#: Address of the hub -> the last answer of `no_answer`, and when it was found (`time.monotonic`).
_last: dict[str, tuple[str, float]] = {}


def no_answer() -> str:
    """Why the hub cannot be reached, as the end of a sentence; empty if it answers.

    A request tells, by way of a proxy where the environment names one. Where HF_HUB_OFFLINE is set,
    nothing is asked.
    """
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if ENDPOINT not in _last or time.monotonic() - _last[ENDPOINT][1] > _HOLDS:
        found: queue.SimpleQueue[str] = queue.SimpleQueue()
        # A name server has no time limit of its own, so the request has a thread to wait in.
        threading.Thread(target=lambda: found.put(_fault_of(ENDPOINT)), daemon=True).start()
        try:
            fault = found.get(timeout=_WAIT)
        except queue.Empty:
            fault = f"no answer in {_WAIT:g} seconds"
        why = fault and f"{ENDPOINT} cannot be reached: {fault}"
        _last[ENDPOINT] = why, time.monotonic()
    return _last[ENDPOINT][0]


def _fault_of(address: str) -> str:
    """Why a request to a web address gets no answer; empty if it gets one."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_WAIT / 2).close()
    except urllib.error.HTTPError:
        return ""  # That is an answer too.
    except Exception as fault:  # no network, no name, a proxy's refusal, an address that is none
        cause = getattr(fault, "reason", fault)
        # The libraries of the hub bring certificates of their own.
        is_certificate = isinstance(cause, ssl.SSLCertVerificationError)
        return "" if is_certificate else reason(cause if isinstance(cause, OSError) else fault)
    return ""
