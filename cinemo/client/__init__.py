"""The client of a cinemo server: create a video, follow it, download it.

>>> with Client("http://127.0.0.1:8000") as client:
...     video = client.create("photo.png", "waves roll in", motion_bucket=12)
...     client.wait(video, progress=lambda video: print(video.step, video.steps))
...     client.download(video, "waves.mp4")

`AsyncClient` has the same methods to await. Importing this loads httpx and pydantic, and nothing of the rest of cinemo.
"""

from cinemo.client import webhooks
from cinemo.client.clients import AsyncClient, Client
from cinemo.client.errors import (
    APIError,
    Conflict,
    ConnectionFailed,
    Forbidden,
    Invalid,
    NotFound,
    ServerFault,
    TooMany,
    UnexpectedAnswer,
    VideoFailed,
    VideoServerError,
    WaitTimeout,
    WebhookInvalid,
)
from cinemo.client.types import DeletedVideo, Model, Preview, RenderedVideo, Video, VideoList
from cinemo.client.webhooks import WebhookEvent

__all__ = [
    "APIError",
    "AsyncClient",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "DeletedVideo",
    "Forbidden",
    "Invalid",
    "Model",
    "NotFound",
    "Preview",
    "RenderedVideo",
    "ServerFault",
    "TooMany",
    "UnexpectedAnswer",
    "Video",
    "VideoFailed",
    "VideoList",
    "VideoServerError",
    "WaitTimeout",
    "WebhookEvent",
    "WebhookInvalid",
    "webhooks",
]
