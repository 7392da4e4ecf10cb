"""Serve a bundle over HTTP: image animation jobs at /v1/videos, until SIGINT or SIGTERM."""

from __future__ import annotations

from collections.abc import Sequence

from cinemo import cli


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, recipe=None)
    parser.add_argument(
        "--bundle", required=True, metavar="DIR", help="folder written by pipelines/export.py, or s3://"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 = every interface")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    parser.add_argument("--state", default=".cinemo/serve", metavar="DIR", help="local directory for jobs and videos")
    parser.add_argument("--max-queued", type=int, default=64, help="jobs that may wait before requests are refused")
    arguments = parser.parse_args(argv)
    from cinemo.serving.app import serve_forever

    serve_forever(arguments.bundle, arguments.host, arguments.port, arguments.state, arguments.max_queued)


if __name__ == "__main__":
    cli.run(main)
