"""What notifications arrive at: a web server and an SMTP server, as small as they can be, each in a thread."""

import asyncio
import email
import email.policy
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Message:
    subject: str
    text: str
    receiver: str = ""


class Receiver:
    """A server on a free port that keeps what it is sent; use it in a ``with`` statement."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._safely(self.serve), "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()

    def _safely(
        self, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer)
            finally:
                writer.close()

        return one

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    def about(self, word: str) -> list[Message]:
        """The messages that have ``word`` in their subject or text."""
        return [message for message in list(self.messages) if word in message.subject + message.text]


class Webhook(Receiver):
    """Answers every POST with 200, or with ``answer``."""

    answer = "200 OK"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks/a-secret-part"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            int(line.partition(":")[2]) for line in head.splitlines() if line.lower().startswith("content-length")
        )
        body: dict[str, Any] = json.loads(await reader.readexactly(length))
        if self.answer.startswith("2"):
            self.messages.append(Message(body["subject"], body["text"], head.split()[1]))
        writer.write(f"HTTP/1.1 {self.answer}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
        await writer.drain()


class Mailbox(Receiver):
    """Takes every mail, without TLS and passwords."""

    @property
    def url(self) -> str:
        return f"mailto://127.0.0.1:{self.port}?from=stillhouse@example.com&to=team@example.com&mode=insecure"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def say(line: str) -> None:
            writer.write(f"{line}\r\n".encode())
            await writer.drain()

        receiver = ""
        await say("220 mailbox")
        while line := (await reader.readline()).decode().strip():
            command = line.split(maxsplit=1)[0].upper()
            if command == "RCPT":
                receiver = line.partition("<")[2].partition(">")[0]
            if command == "QUIT":
                await say("221 bye")
                return
            if command != "DATA":
                await say("250 ok")
                continue
            await say("354 go on")
            raw = await reader.readuntil(b"\r\n.\r\n")
            mail = email.message_from_bytes(raw[:-5], policy=email.policy.default)
            body = mail.get_body(("plain",))
            self.messages.append(Message(str(mail["subject"]), body.get_content() if body else "", receiver))
            await say("250 kept")
