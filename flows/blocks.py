"""Where notifications go: a webhook and an e-mail address, kept as Prefect blocks, never in files of ours.

Both are block types that every Prefect server has: one that knows nothing of this project can act with them too.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

from prefect.blocks.notifications import SlackWebhook
from prefect.blocks.webhook import Webhook
from prefect.types import SecretDict
from pydantic import SecretStr

from compression.errors import InputError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

Kind = Literal["webhook", "email"]
KINDS: tuple[Kind, ...] = ("webhook", "email")
PREFIX = "stillhouse-"
VARIABLES: dict[Kind, str] = {"webhook": "STILLHOUSE_NOTIFY_WEBHOOK", "email": "STILLHOUSE_NOTIFY_EMAIL"}
"""Environment variables that ``stillhouse up`` takes into blocks."""


@dataclass(frozen=True)
class Channel:
    """A saved place that notifications go to."""

    name: str
    kind: Kind
    id: UUID
    shown: str
    """Host and receiver, without anything secret."""


def save(client: "SyncPrefectClient", kind: Kind, url: str, *, name: str | None = None) -> str:
    """Save a webhook or an e-mail address as a block, replacing one of the same name; returns the name.

    Raises:
        InputError: the address is none.
    """
    name = name or f"{PREFIX}{kind}"
    if not name.startswith(PREFIX):
        name = PREFIX + name
    block = block_of(kind, url)
    with _talking_to(client):
        block.save(name, overwrite=True)
    return name


def block_of(kind: Kind, url: str) -> SlackWebhook | Webhook:
    """The block of an address.

    Raises:
        InputError: the address is none.
    """
    parts = urlsplit(url)
    if kind == "webhook":
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"Webhook '{_masked(url)}' has no address that can be called, expected http:// or https:// and a host. "
                "Copy the whole address from the page that made it."
            )
        return Webhook(url=SecretStr(url), headers=SecretDict({"content-type": "application/json"}))
    if parts.scheme not in ("mailto", "mailtos") or not parts.hostname:
        raise InputError(
            f"E-mail address '{_masked(url)}' has no SMTP server, expected mailtos://USER:PASSWORD@HOST:PORT?from=SENDER"
            "&to=RECEIVER (mailto:// and mode=insecure for a server without TLS). "
            "Write @ and other special letters of user and password as %40 and so on."
        )
    plain = url if "format=" in parts.query else f"{url}{'&' if parts.query else '?'}format=text"
    # The only built-in block that hands any Apprise URL on; a class of our own a Prefect server would not know.
    block = SlackWebhook(url=SecretStr(plain))
    if not len(block._apprise_client):
        raise InputError(
            f"E-mail address '{_masked(url)}' is not understood, expected mailtos://USER:PASSWORD@HOST:PORT?from=SENDER"
            "&to=RECEIVER. Write @ and other special letters of user and password as %40 and so on."
        )
    return block


def take_from_environment(client: "SyncPrefectClient") -> list[str]:
    """Save what the environment names, and take it out of the environment: child processes need not know it."""
    return [save(client, kind, url) for kind, variable in VARIABLES.items() if (url := os.environ.pop(variable, ""))]


def channels(client: "SyncPrefectClient") -> list[Channel]:
    """Every saved place, by name."""
    found = []
    for document in client.read_block_documents(limit=200, include_secrets=True):
        kind = _kind_of(document.block_type.slug if document.block_type else "")
        if kind is not None and document.name and document.name.startswith(PREFIX):
            found.append(Channel(document.name, kind, document.id, _shown(kind, str(document.data.get("url", "")))))
    return sorted(found, key=lambda channel: channel.name)


def remove(client: "SyncPrefectClient", name: str) -> None:
    """Delete a saved place.

    Raises:
        InputError: there is none of that name.
    """
    known = {channel.name: channel for channel in channels(client)}
    channel = known.get(name) or known.get(PREFIX + name)
    if channel is None:
        raise InputError(
            f"Notification target '{name}' does not exist, expected one of: {', '.join(known) or 'none is saved'}. "
            "See `stillhouse notify list`."
        )
    client.delete_block_document(channel.id)


def _kind_of(slug: str) -> Kind | None:
    email, webhook = SlackWebhook.get_block_type_slug(), Webhook.get_block_type_slug()
    kinds: dict[str, Kind] = {email: "email", webhook: "webhook"}
    return kinds.get(slug)


def _shown(kind: Kind, url: str) -> str:
    parts = urlsplit(url)
    if kind == "webhook":
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return f"{', '.join(parse_qs(parts.query).get('to', ['its sender']))} by {parts.hostname}"


def _masked(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://..." if parts.scheme else "..."


@contextmanager
def _talking_to(client: "SyncPrefectClient") -> Iterator[Any]:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        yield
