"""The way to S3: one client, what its faults mean, and how long they are met with patience.

Credentials and endpoint come from the environment as for every AWS tool (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ...). What is not there is a `FileNotFoundError`, what is forbidden an `AccessDenied`. Everything
else that goes wrong on the way to S3 (no answer, 5xx, throttling, a connection that drops) is tried again for
``CINEMO_STORAGE_PATIENCE`` seconds (180 by default) and then a `RunError`: an outage is nobody's bad clip. A request
that the server does not know (501) is final, and so is a fault of the local disk.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from cinemo.types import InputError, RunError, local_fault

PATIENCE = "CINEMO_STORAGE_PATIENCE"
# Otherwise SDKs send a checksum behind the body (aws-chunked). Servers that do not know it refuse the request, or store
# the checksum with the content. Every process that has a client of pyarrow's needs this.
ENVIRONMENT = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
# An object of less than two parts is one PUT, a larger one a multipart upload: a failed part alone is sent again.
_PART_BYTES = 32 << 20
_PARTS_AT_ONCE = 4
# Answers that no patience mends: the wrong region, a request that cannot be.
_HOPELESS = frozenset(
    {"301", "PermanentRedirect", "AuthorizationHeaderMalformed", "405", "MethodNotAllowed"}
    | {"InvalidRequest", "InvalidArgument", "EntityTooLarge", "MalformedXML"}
)
_BAD_NAME = frozenset({"InvalidBucketName", "InvalidURI", "KeyTooLongError"})
_PAST_END = frozenset({"416", "InvalidRange"})
_CONDITION_FAILED = frozenset({"412", "PreconditionFailed", "ConditionalRequestConflict"})
_NOT_THERE = frozenset({"501", "NotImplemented"})


class AccessDenied(InputError, PermissionError):
    """These credentials may not touch this object; others they may."""


class NoBucket(InputError, FileNotFoundError):
    """The bucket does not exist, and so nothing in it."""


class NotSupported(InputError):
    """This server does not have that request, or that option of one."""


class BadName(InputError):
    """No object can have this name."""


class PastEnd(InputError):
    """The object ends before the range of bytes that was asked for."""


@functools.cache
def client() -> Any:
    import s3fs

    class AnyKey(s3fs.S3FileSystem):  # type: ignore[misc]
        def split_path(self, path: str) -> tuple[str, str, None]:
            """Bucket and key. s3fs would read a key's ``?versionId=`` as something else."""
            return *self._find_bucket_key(path.removeprefix("s3://").lstrip("/")), None

    # botocore tries a request again (standard mode: backs off with jitter, and less when everything fails). What it
    # does not see, above all a body that breaks off, `call` does: retries of s3fs between the two would multiply.
    made = AnyKey(
        config_kwargs={
            "retries": {"total_max_attempts": 5, "mode": "standard"},
            "connect_timeout": 5,
            "read_timeout": 60,
            "request_checksum_calculation": "when_required",  # as `ENVIRONMENT`
        },
        use_listings_cache=False,
        default_cache_type="none",
        skip_instance_cache=True,
    )
    made.retries = 1
    return made


def filesystem(uri: str) -> Any:
    scheme = uri.partition("://")[0]
    if scheme != "s3":
        raise InputError(f"{uri}: scheme {scheme!r} is not supported; expected a local path or s3://bucket/key")
    return client()


def call(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
    """A method of the filesystem, again and again while S3 fails in ways that pass."""
    import aiohttp
    import botocore.exceptions as faults
    from botocore.parsers import ResponseParserError

    remote, outage = filesystem(uri), Outage(uri)
    while True:
        try:
            return getattr(remote, method)(*arguments, **options)
        except FileExistsError:
            raise  # a condition of `compare_and_swap.write_if`
        except FileNotFoundError as error:
            # The reply to a finished multipart upload was lost, and it was finished again: the object may be there.
            if _code(error) == "NoSuchBucket":
                raise NoBucket(f"{uri}: the bucket does not exist; create it or choose another one") from None
            if _code(error) != "NoSuchUpload":
                raise
            outage.wait(error)
        except (PermissionError, faults.NoCredentialsError, faults.PartialCredentialsError) as error:
            _raise_local(error, arguments)
            if _code(error) in ("AccessDenied", "403"):
                raise AccessDenied(f"{uri}: access denied ({brief(error)}); check the bucket's policy") from None
            raise InputError(f"{uri}: {brief(error)}; check AWS_* in the environment") from None
        except (OSError, faults.BotoCoreError, ResponseParserError, aiohttp.ClientError, TimeoutError) as error:
            if _code(error) in _CONDITION_FAILED:
                raise FileExistsError(f"{uri}: {brief(error)}") from None
            _raise_local(error, arguments)
            if _code(error) in _NOT_THERE:
                request = getattr(error.__cause__, "operation_name", method)
                raise NotSupported(f"{uri}: the S3 server does not know this {request} request (501)") from None
            if _code(error) in _BAD_NAME or isinstance(error, faults.ParamValidationError):
                raise BadName(f"{uri}: {brief(error)}; expected s3://bucket/key") from None
            if _code(error) in _PAST_END:
                raise PastEnd(f"{uri}: {brief(error)}") from None
            if _code(error) in _HOPELESS:
                raise InputError(f"{uri}: {brief(error)}; check bucket, region and endpoint") from None
            outage.wait(error)


_own_patience: ContextVar[float | None] = ContextVar("patience", default=None)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """For how long calls of this thread meet outages, where that is less than ``CINEMO_STORAGE_PATIENCE``."""
    token = _own_patience.set(seconds)
    try:
        yield
    finally:
        _own_patience.reset(token)


class Outage:
    """The time in which a storage fails: how long a call still tries."""

    def __init__(self, uri: str) -> None:
        own, general = _own_patience.get(), float(os.environ.get(PATIENCE) or 180)
        self._uri, self._patience = uri, general if own is None else min(own, general)
        self._begun, self._pause = time.monotonic(), 0.25

    def wait(self, fault: Exception) -> None:
        """Pause before the next attempt.

        Raises:
            RunError: there was patience enough.
        """
        waited = time.monotonic() - self._begun
        if waited > self._patience:
            raise RunError(
                f"{self._uri}: storage has been failing for {waited:.0f} s ({brief(fault)}); run the same command "
                f"again once it answers ({PATIENCE} is {self._patience:g} s)"
            ) from None
        logging.getLogger(__name__).warning("%s: %s, trying again", self._uri, brief(fault))
        time.sleep(random.uniform(0, self._pause))
        self._pause = min(2 * self._pause, 15)


def _raise_local(error: BaseException, arguments: Sequence[Any]) -> None:
    """Raise what the local disk did, which is no outage. An answer of S3 has botocore's error as its cause."""
    import aiohttp

    if isinstance(error, OSError) and error.__cause__ is None and not isinstance(error, aiohttp.ClientError):
        fault = local_fault(error, str(arguments[-1]))
        if fault:
            raise fault from None


def _code(error: BaseException) -> str:
    """S3's code of a translated error: ``NoSuchBucket``, ``SlowDown``, ``503`` ..."""
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) and "Error" in response else ""


class _Pieces:
    """Buffers that look like one to s3fs, which asks for a length and for slices; a slice is a copy."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self.pieces = pieces
        self.size = sum(piece.nbytes for piece in pieces)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, wanted: slice) -> bytes:
        start, stop, _ = wanted.indices(self.size)
        parts, offset = [], 0
        for piece in self.pieces:
            if offset < stop and offset + piece.nbytes > start:
                parts.append(piece[max(0, start - offset) : stop - offset])
            offset += piece.nbytes
        return b"".join(parts)


def put(uri: str, pieces: Sequence[memoryview]) -> None:
    """Write an object whole: it is there with all of its content, or not at all."""
    data = _Pieces(pieces)
    body = data[:] if len(data) < 2 * _PART_BYTES else data
    call(uri, "pipe_file", uri, body, chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)


def put_if(uri: str, data: bytes, **condition: str) -> str:
    """Write a small object with one PUT, and a condition on it; returns its ETag.

    Raises:
        FileExistsError: ``IfNoneMatch="*"``, and there is one; ``IfMatch=ETAG``, and it has another one; or the server
            took the request but stored nothing, as a newer PUT had come first (Swift's 202, which has no ETag).
        FileNotFoundError: ``IfMatch``, and there is none.
        NotSupported: the server knows no such condition.
    """
    bucket, key = split(uri)
    answer = call(uri, "call_s3", "put_object", Bucket=bucket, Key=key, Body=data, **condition)
    if "ETag" not in answer:
        raise FileExistsError(f"{uri}: a newer PUT came first")
    return str(answer["ETag"])


def has_bucket(bucket: str) -> bool:
    """False where it certainly does not exist; one that may not be looked at may be there."""
    try:
        call(f"s3://{bucket}", "call_s3", "head_bucket", Bucket=bucket)
    except FileNotFoundError:
        return False
    except InputError:  # forbidden, or a request that the server does not know
        return True
    return True


def etag(uri: str) -> str:
    """The ETag of an object. Raises `FileNotFoundError`."""
    bucket, key = split(uri)
    return str(call(uri, "call_s3", "head_object", Bucket=bucket, Key=key)["ETag"])


def split(uri: str) -> tuple[str, str]:
    """Bucket and key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def put_requests(size: int) -> int:
    """Requests that write an object of so many bytes."""
    return 1 if size < 2 * _PART_BYTES else 2 + -(-size // _PART_BYTES)


def brief(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
