"""API keys and their tenants."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from retrieval_draft.errors import InvalidInputError

__all__ = ["KEYS_VARIABLE", "KeyRing", "is_loopback", "read_keys"]

KEYS_VARIABLE = "RETRIEVAL_DRAFT_API_KEYS"
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


class KeyRing:
    """Finds the tenant of a key in a time that does not depend on the keys.

    Args:
        keys: Tenant by key; empty for no authentication.
        default: The tenant of all requests without keys.
    """

    def __init__(self, keys: Mapping[str, str], default: str = "default") -> None:
        # Digests have one length, so that a comparison does not reveal that of a key.
        self._tenants = [(_digest(key), tenant) for key, tenant in keys.items()]
        self.default = default

    @property
    def tenants(self) -> list[str]:
        """Every tenant once, the default one first."""
        return list(dict.fromkeys([self.default, *(tenant for _, tenant in self._tenants)]))

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, authorization: str | None) -> str | None:
        """The tenant of a request; None if it is to be refused.

        Args:
            authorization: The header of that name, ``Bearer KEY``.
        """
        if not self._tenants:
            return self.default
        scheme, _, key = (authorization or "").partition(" ")
        given, found = _digest(key.strip()), None
        for digest, tenant in self._tenants:  # all of them, whichever matches
            if hmac.compare_digest(digest, given):
                found = tenant
        return found if scheme.lower() == "bearer" else None


def read_keys(
    given: Iterable[str], file: Path | None, default: str, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Keys from options, a file with one a line, and the environment, separated by commas there.

    Args:
        given: ``KEY`` or ``KEY=TENANT``.
        file: The same, one a line; ``#`` begins a comment.
        default: The tenant of keys without one.
        environ: The environment.

    Raises:
        InvalidInputError: A key is empty, too short or given twice, a tenant is no name, or the file cannot
            be read.
    """
    words = [*given, *(word for word in environ.get(KEYS_VARIABLE, "").split(",") if word.strip())]
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"The key file {file} cannot be read: {error}.") from error
        words += [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    keys: dict[str, str] = {}
    for word in words:
        key, _, tenant = word.strip().partition("=")
        tenant = tenant or default
        if len(key) < 8:
            raise InvalidInputError("An API key has fewer than 8 characters.", "Make longer ones.")
        if not _TENANT.fullmatch(tenant) or tenant in (".", ".."):
            raise InvalidInputError(
                f"The tenant {tenant!r} is no name.", "Use 1 to 64 letters, digits, dots, - and _."
            )
        if keys.get(key, tenant) != tenant:
            raise InvalidInputError("An API key belongs to two tenants.", "Give each tenant its own.")
        keys[key] = tenant
    return keys


def is_loopback(host: str) -> bool:
    """True if only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
