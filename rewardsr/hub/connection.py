"""The Hugging Face Hub: whether it can be reached, and what its refusals mean."""

import os
import socket
import threading
from contextlib import suppress
from functools import cache
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

from rewardsr.errors import UserError, shown

TIMEOUT = 10.0  # seconds for the answer to a short question; the Hub's client would wait for ever
_ON = {"1", "ON", "YES", "TRUE"}
_MEANINGS = {
    401: "the Hub does not accept the token",
    403: "the Hub forbids it to this token",
    404: "there is no such thing on the Hub",
    409: "it is in conflict with what is there",
    412: "something else was pushed in the meantime",
    429: "too many requests, try later",
}


@cache
def online(timeout: float = 3.0) -> bool:
    """Whether the Hub's host answers; asked once a process.

    The Hub's client retries for half a minute without a connection, so this is asked first. HF_HUB_OFFLINE and
    HF_ENDPOINT are honoured; behind a proxy the proxy's host is tried.

    Args:
        timeout: seconds to wait for the connection.

    Raises:
        UserError: HF_ENDPOINT or the proxy's variable is no address.
    """
    if (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in _ON:
        return False
    scheme, host, port = _address("HF_ENDPOINT", os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxy = getproxies().get(scheme) or getproxies().get("all")
    if proxy and not proxy_bypass(host):
        scheme, host, port = _address(f"{scheme}_proxy", proxy if "//" in proxy else f"//{proxy}")
    answered: list[bool] = []

    def connect() -> None:
        with suppress(OSError), socket.create_connection((host, port), timeout=timeout):
            answered.append(True)

    # In a thread, because looking up the name may take far longer than `timeout` and knows none of its own.
    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(timeout)
    return bool(answered)


def _address(variable: str, text: str) -> tuple[str, str, int]:
    """Scheme, host and port."""
    try:
        parts = urlparse(text)
        host, port = parts.hostname, parts.port
        host.encode("idna") if host else None  # as the connection will
    except ValueError:  # UnicodeError, too
        host = None
    if not host or parts.scheme not in ("", "http", "https"):
        raise UserError(f"{variable} is {shown(text)}, expected an address such as https://huggingface.co")
    return parts.scheme, host, port or (80 if parts.scheme == "http" else 443)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status with which the Hub refused something; None where no answer came."""
    while error is not None:  # the client wraps what fails in one of its threads
        answer = getattr(error, "response", None)
        if answer is not None:
            return int(answer.status_code)
        error = error.__cause__
    return None


def reason(error: BaseException) -> str:
    """Why a request to the Hub failed, in a few words: what it answered, or that no proper answer came."""
    status, said = status_of(error), ""
    while error.__cause__ is not None and not said:
        said, error = getattr(error, "server_message", None) or "", error.__cause__
    if status is None:
        return f"no proper answer from the Hub ({(str(error).splitlines() or [type(error).__name__])[0]})"
    said = " ".join((said or getattr(error, "server_message", None) or "").split())
    meaning = _MEANINGS.get(status, "the Hub has trouble, try later" if status >= 500 else "the Hub refuses it")
    return f"{meaning} ({status}{': ' if said else ''}{said})"
