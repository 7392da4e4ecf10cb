"""Reading gs:// and az://, through the fsspec packages that know them, where these are installed.

Credentials come from the environment as for every tool of these clouds (``GOOGLE_APPLICATION_CREDENTIALS``,
``AZURE_STORAGE_CONNECTION_STRING``, ...). What faults mean, and how long they are met with patience, is as in
`cinemo.s3`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from cinemo.s3 import AccessDenied, Outage, PastEnd, brief
from cinemo.types import NO_ROOM, InputError, local_fault

PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
_LIBRARIES = frozenset({"adlfs", "aiohttp", "azure", "gcsfs", "google", "requests", "urllib3"})


def is_installed(scheme: str) -> bool:
    return importlib.util.find_spec(PACKAGES[scheme]) is not None


def call(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
    """A method of the uri's filesystem with the uri's path and ``arguments``, again and again while it fails in ways
    that pass.

    Raises:
        FileNotFoundError: there is no such object.
        PastEnd: the range of bytes lies behind the object's end.
        AccessDenied: these credentials may not read it.
        InputError: no credentials, or the scheme's package is not installed.
        RunError: the storage fails for ``CINEMO_STORAGE_PATIENCE`` seconds, or the local disk is full.
    """
    outage = Outage(uri)
    while True:
        try:
            filesystem = _filesystem(uri)
            return getattr(filesystem, method)(filesystem._strip_protocol(uri), *arguments, **options)
        except (FileNotFoundError, InputError):
            raise
        except Exception as error:
            status = _status(error)
            if status == 404:
                raise FileNotFoundError(f"{uri}: {brief(error)}") from None
            if status == 416:
                raise PastEnd(f"{uri}: {brief(error)}") from None
            if isinstance(error, PermissionError) or status == 403 or str(error).startswith("Forbidden"):
                raise AccessDenied(f"{uri}: access denied ({brief(error)}); check who may read it") from None
            if status == 401 or "Credentials" in type(error).__name__:
                raise InputError(f"{uri}: {brief(error)}; check the credentials in the environment") from None
            if isinstance(error, OSError) and error.errno in NO_ROOM and (fault := local_fault(error, uri)):
                raise fault from None
            if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _LIBRARIES:
                raise
            outage.wait(error)


def _filesystem(uri: str) -> Any:
    """fsspec keeps one for each scheme and account."""
    import fsspec

    scheme = uri.partition("://")[0]
    if scheme not in PACKAGES:
        raise InputError(f"{uri}: scheme {scheme!r} is not supported; expected {', '.join(PACKAGES)}")
    try:
        kind = fsspec.get_filesystem_class(scheme)
        return kind(**{"use_listings_cache": False, **kind._get_kwargs_from_urls(uri)})
    except ImportError:
        raise InputError(f"{uri}: {scheme}:// needs `pip install {PACKAGES[scheme]}`") from None
    except ValueError as error:
        raise InputError(f"{uri}: {brief(error)}; check the credentials in the environment") from None


def _status(error: Exception) -> int:
    """The HTTP status behind an error; 0 where there is none."""
    for name in ("status_code", "code", "status"):
        with_status = getattr(error, name, None)
        if str(with_status).isdigit():
            return int(str(with_status))
    return 0
