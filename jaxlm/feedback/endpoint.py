"""A model behind an OpenAI-compatible address, asked with the standard library alone.

Nothing is sent anywhere that the caller did not name: addresses other than this machine's need `remote`, redirects are
refused, and a key comes from an environment variable, goes into one header over https and is never shown or stored.
"""

import concurrent.futures
import dataclasses
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation
from jaxlm.data.messages import to_messages
from jaxlm.feedback.journal import Journal, question

Say = Callable[[Sequence[Conversation]], list[str | None]]

LARGEST_ANSWER = 1 << 20  # bytes
LONGEST_PAUSE = 30.0  # seconds before a request is sent again
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
MOST_FAILURES = 3  # conversations in a row without an answer, after which nobody is there


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """url: up to the part before /chat/completions, such as http://localhost:8000/v1. timeout: seconds a request."""

    url: str
    model: str
    key_variable: str | None = None  # environment variable that holds the key
    remote: bool = False  # allow addresses other than this machine's
    timeout: float = 60.0
    retries: int = 3
    pause: float = 1.0  # seconds before the first retry; doubles with each
    max_tokens: int = 8
    workers: int = 4  # requests at once

    def __post_init__(self):
        url = urllib.parse.urlsplit(self.url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(
                f"an endpoint's address begins with http:// or https://, got {url.scheme or self.url[:20]!r}"
            )
        if url.username is not None or url.password is not None or url.query or url.fragment:
            raise UserError("an endpoint's address holds no key, password or query: name a variable that holds the key")
        if not self.is_local and not self.remote:
            raise UserError(f"{url.hostname} is another machine: nothing is sent there unless that is allowed")
        if not self.is_local and self.key_variable is not None and url.scheme != "https":
            raise UserError(f"a key is sent to {url.hostname} over https only")
        if not 0 < self.timeout < float("inf") or self.retries < 0 or self.workers < 1 or self.max_tokens < 1:
            raise UserError(
                "an endpoint needs a finite timeout above 0, retries of at least 0, workers and max_tokens of 1"
            )

    @property
    def is_local(self) -> bool:
        host = urllib.parse.urlsplit(self.url).hostname
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def name(self) -> str:
        return f"{self.model} at {urllib.parse.urlsplit(self.url).netloc}"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None  # urllib would send the key's header on to wherever it is sent


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable}, which is to hold the key, is not set")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"what the environment variable {variable} holds is no key")  # and is not shown
    return key


def _read(response, seconds: float) -> bytes:
    """The whole answer. The socket's own timeout starts again with every byte."""
    end, parts, size = time.monotonic() + seconds, [], 0
    while block := response.read1(1 << 16):
        parts.append(block)
        size += len(block)
        if size > LARGEST_ANSWER:
            raise UserError(f"the endpoint's answer is longer than {LARGEST_ANSWER} bytes")
        if time.monotonic() > end:
            raise TimeoutError
    return b"".join(parts)


def _text(data: bytes) -> str:
    try:
        text = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError("the endpoint does not answer as OpenAI's chat completions do") from None
    return text if isinstance(text, str) else ""


def _wait(error: urllib.error.HTTPError | None, pause: float) -> float:
    """What the server asks for in seconds, or the pause."""
    asked = "" if error is None else error.headers.get("Retry-After", "")
    return min(float(asked) if asked.isdigit() else pause, LONGEST_PAUSE)


def say(endpoint: Endpoint, journal: Journal | None = None) -> Say:
    """Asks for the reply to each conversation, greedily; None where there was none after all retries.

    journal: what it knows is not asked again, and every reply is there as soon as it has come.

    `UserError` where asking again cannot help: the key or the model is refused, the answer is none of this API's, or
    several conversations in a row got no answer.
    """
    key = _key(endpoint.key_variable)
    handlers = [_NoRedirects(), *([urllib.request.ProxyHandler({})] if endpoint.is_local else [])]
    opener = urllib.request.build_opener(*handlers)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    address = endpoint.url.rstrip("/") + "/chat/completions"

    def ask(conversation: Conversation) -> str | None:
        asked = {"model": endpoint.model, "messages": to_messages(conversation), "temperature": 0}
        data = json.dumps(asked | {"max_tokens": endpoint.max_tokens}).encode()
        for attempt in range(endpoint.retries + 1):
            request, refused = urllib.request.Request(address, data, headers), None
            try:
                with opener.open(request, timeout=endpoint.timeout) as response:
                    return _text(_read(response, endpoint.timeout))
            except urllib.error.HTTPError as e:
                e.close()
                if e.code not in TRANSIENT:
                    raise UserError(f"{endpoint.name} refuses: HTTP status {e.code}") from None
                refused = e
            except (OSError, http.client.HTTPException):  # URLError and TimeoutError are OSErrors
                pass
            if attempt < endpoint.retries:
                time.sleep(_wait(refused, endpoint.pause * 2**attempt))
        return None

    def known(conversation: Conversation) -> str | None:
        if journal is None:
            return ask(conversation)
        return journal.get(0, question(endpoint.name, conversation), lambda: ask(conversation))

    def ask_all(conversations: Sequence[Conversation]) -> list[str | None]:
        out, failures = [], 0
        with concurrent.futures.ThreadPoolExecutor(endpoint.workers) as pool:
            try:
                for text in pool.map(known, conversations):
                    out.append(text)
                    failures = failures + 1 if text is None else 0
                    if failures == MOST_FAILURES:
                        raise UserError(f"{endpoint.name} does not answer ({failures} questions in a row)")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return out

    return ask_all
