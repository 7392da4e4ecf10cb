"""Serve a bundle over HTTP: image animation jobs at /v1/videos, until SIGINT or SIGTERM; SIGHUP loads a new bundle.

With --add-key, --list-keys or --revoke-key it manages the API keys of a database instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from cinemo import cli


def main(argv: Sequence[str] | None = None) -> None:
    with cli.libraries():
        from cinemo.serving.settings import ServeSettings, open_keys, parse_settings, read_config

    parser = cli.parser(__doc__, recipe=None)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config file of `serve run`, like cluster/serve.yaml; flags take precedence",
    )
    parser.add_argument("--host", help="address to listen on; 0.0.0.0 = every interface (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    for name, field in ServeSettings.model_fields.items():
        flag, known = f"--{name.replace('_', '-')}", field.description or ""
        if not field.is_required() and field.default is not None:
            known += f" (default: {field.default})"
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=known)
        else:
            parts = [part for part in get_args(field.annotation) or [field.annotation] if part is not type(None)]
            if isinstance(parts[0], str):
                parser.add_argument(flag, choices=parts, default=None, help=known)
            else:
                parser.add_argument(flag, type=parts[0], default=None, help=known, metavar=parts[0].__name__.upper())
    keys = parser.add_argument_group("API keys of the database")
    keys.add_argument("--add-key", metavar="NAME", help="make a key and print it; it is shown only once")
    keys.add_argument("--max-active", type=int, help="limit of the new key: unfinished jobs at a time")
    keys.add_argument("--per-day", type=int, help="limit of the new key: jobs in 24 hours")
    keys.add_argument("--list-keys", action="store_true", help="print the keys, without their secrets")
    keys.add_argument("--revoke-key", metavar="ID", help="refuse this key from now on")
    arguments = parser.parse_args(argv)

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        settings, http = read_config(arguments.config) if arguments.config else ({}, {})
        given = {name: getattr(arguments, name) for name in ServeSettings.model_fields}
        return settings | {name: value for name, value in given.items() if value is not None}, http

    values, http = read()
    if arguments.add_key or arguments.list_keys or arguments.revoke_key:
        managed = parse_settings({"bundle": "", **values}).absolute()
        manage_keys(arguments, open_keys(managed), managed.webhook_secret)
        return
    settings = parse_settings(values)
    with cli.libraries():
        from cinemo.serving.app import serve_forever

    host, port = arguments.host or http.get("host") or "127.0.0.1", arguments.port or http.get("port") or 8000
    serve_forever(settings, host, port, reload=lambda: parse_settings(read()[0]))


def manage_keys(arguments: argparse.Namespace, store: Any, webhook_secret: str | None) -> None:
    from cinemo.serving.http.signatures import secret_of
    from cinemo.types import InputError

    if arguments.add_key:
        key, token = store.create(arguments.add_key, arguments.max_active, arguments.per_day)
        print(f"{key.id}  {key.name}  {token}")
        if webhook_secret is not None:
            print(f"its webhooks are signed with {secret_of(webhook_secret, key.id)}")
    if arguments.revoke_key and not store.revoke(arguments.revoke_key):
        raise InputError(f"--revoke-key {arguments.revoke_key}: no such key, or already revoked (see --list-keys)")
    for key in store.list() if arguments.list_keys else ():
        made = datetime.fromtimestamp(key.created_at, UTC).date()
        limits = f"max-active {key.quota.max_active or '-'}, per-day {key.quota.per_day or '-'}"
        print(f"{key.id}  {key.name}  made {made}  {limits}{'  revoked' if key.revoked_at else ''}")


if __name__ == "__main__":
    cli.run(main)
