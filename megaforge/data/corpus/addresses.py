"""Web addresses: one form for the same page, and the registered domain of a host. Nothing is looked up in a network."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np

from megaforge.errors import require

# Parameters that say how a reader came to a page.
_TRACKING = ("utm_", "mc_", "pk_", "piwik_", "hsa_")
_TRACKING_NAMES = frozenset(
    "fbclid gclid gclsrc dclid msclkid yclid igshid ref ref_src ref_url spm sessionid phpsessid".split()
)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def canonical(url: str) -> str:
    """One form of the addresses of one page: without scheme, ``www.``, default port, fragment, tracking parameters and
    trailing slash, the host in lower case, parameters in order. An address that cannot be parsed stays as it is."""
    try:
        parts = urlsplit(url.strip() if "//" in url else f"//{url.strip()}")
        host = (parts.hostname or "").removeprefix("www.").rstrip(".")
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return url.strip()
    if port == _DEFAULT_PORTS.get(parts.scheme.lower()):
        port = ""
    kept = [
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if not name.lower().startswith(_TRACKING) and name.lower() not in _TRACKING_NAMES
    ]
    query = f"?{urlencode(sorted(kept))}" if kept else ""
    return f"{host}{port}{parts.path.rstrip('/')}{query}"


class Domains:
    """Registered domains (``bbc.co.uk`` of ``news.bbc.co.uk``) by tldextract's own list of public suffixes."""

    def __init__(self, purpose: str) -> None:
        tldextract = require("tldextract", extra="corpus", purpose=purpose)
        self._extract = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None, include_psl_private_domains=True)
        self.of = functools.lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, host: str) -> str:
        found = self._extract(host)
        return f"{found.domain}.{found.suffix}" if found.domain and found.suffix else host


def host_of(url: str) -> str:
    """The host of an address in lower case; empty where there is none."""
    try:
        return urlsplit(url.strip() if "//" in url else f"//{url.strip()}").hostname or ""
    except ValueError:
        return ""


def keys_of(names: Sequence[str]) -> Any:
    """64 bits of each name's SHA-256 [names] uint64."""
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, "<u8")
