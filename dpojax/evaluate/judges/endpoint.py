"""A language model behind an OpenAI-compatible endpoint: requests, tried again where that can help, and answers."""

import dataclasses
import datetime
import email.utils
import http.client
import itertools
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from dpojax.errors import UserError, first_line

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; each wait is twice the one before
LONGEST_ASKED = 600.0  # seconds that a server may ask us to wait
AGAIN = (408, 409, 425, 429)
"""Statuses of the client's errors after which the same request may succeed; so it may after all of the server's."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says, and what it took; tokens are 0 where the server does not count them."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


class Retry(Exception):
    """The same request may succeed later, after ``wait`` seconds where the server says so."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirections are errors: a key is for the host that was named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model answers (``/v1/chat/completions``), and how it is asked.

    Attributes:
      url: the server's, with or without ``/v1`` and ``/chat/completions``.
      model: its name there.
      key: sent as a bearer token where there is one.
      max_answer_tokens: of an answer, at most.
      options: further fields of every request; None takes a field of ours out.
      concurrency: requests at one time.
      retries: of a request, after the first try.
      timeout: seconds that a request may take.
    """

    url: str
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    max_answer_tokens: int = 256
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    concurrency: int = 8
    retries: int = 5
    timeout: float = 120.0

    def body(self, text: str) -> dict[str, Any]:
        """The request that asks a text."""
        ours = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.max_answer_tokens,
        }
        return {name: value for name, value in (ours | self.options).items() if value is not None}

    def ask(self, text: str, stop: threading.Event | None = None) -> Answer:
        """The model's answer to a text.

        Raises:
          UserError: the server refuses, or fails each time.
        """
        stop = stop or threading.Event()
        for tries in itertools.count(1):
            try:
                return self._try(text)
            except Retry as error:
                wait = min(FIRST_WAIT * 2 ** min(tries - 1, 30), LONGEST_WAIT) if error.wait is None else error.wait
                if tries > self.retries or wait > LONGEST_ASKED or stop.is_set():
                    later = f" and asks to wait {wait:.0f} s" if error.wait else ""
                    times = f"after {tries} tries" if tries > 1 else "at once"
                    raise UserError(
                        f"{self.place()}: {self._clean(str(error))}{later}; given up {times}: run the command again "
                        "later, and what has been answered is not asked again"
                    ) from None
                stop.wait(wait)
        raise AssertionError

    def place(self) -> str:
        """The URL that requests go to, without what follows a ``?``."""
        return chat_url(self.url).partition("?")[0]

    def _try(self, text: str) -> Answer:
        headers = {"Content-Type": "application/json", "User-Agent": "dpojax"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(chat_url(self.url), json.dumps(self.body(text)).encode(), headers)
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                return answer_of(response.read())
        except urllib.error.HTTPError as error:
            said = f"answers {error.code} ({self._clean(_message(error))})"
            if error.code in AGAIN or error.code >= 500:
                raise Retry(said, seconds_of(error.headers.get("Retry-After"))) from None
            how = "check the key, which --api-key-env names" if error.code in (401, 403) else "check --endpoint"
            raise UserError(f"{self.place()}: {said}; {how}, --judge-model and --request-options") from None
        except TimeoutError:
            raise Retry(f"gives no answer in {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None)
            if isinstance(reason, TimeoutError):
                raise Retry(f"gives no answer in {self.timeout:g} s") from None
            raise Retry(f"cannot be reached ({first_line(reason if isinstance(reason, OSError) else error)})") from None

    def _clean(self, said: str) -> str:
        """What a server says, without the key that it may have repeated."""
        return said.replace(self.key, "(the key)") if self.key else said


def chat_url(url: str) -> str:
    """The URL of chat completions of a server.

    >>> chat_url("http://localhost:8000/v1/"), chat_url("https://host.example")
    ('http://localhost:8000/v1/chat/completions', 'https://host.example/v1/chat/completions')
    """
    base, mark, query = url.partition("?")
    base = base.rstrip("/")
    if not base.endswith("/chat/completions"):
        path = urllib.parse.urlsplit(base).path
        base += "/chat/completions" if path else "/v1/chat/completions"
    return base + mark + query


def check_url(url: str) -> None:
    """Refuse what is no URL of a server, or holds a password.

    Raises:
      UserError: naming the flag.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable or any(not "!" <= letter <= "~" for letter in url):
        raise UserError(f"--endpoint {url}: is no URL of a server; give it as in http://localhost:8000/v1")
    if "@" in parts.netloc:
        raise UserError(
            f"--endpoint {parts.scheme}://...@{parts.hostname}: holds a name or password; use --api-key-env"
        )


def seconds_of(retry_after: str | None) -> float | None:
    """The seconds to wait that a Retry-After header says, as a number or as a date; None where it says none."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(retry_after)
        return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return None


def answer_of(raw: bytes) -> Answer:
    """The answer in a response.

    Raises:
      Retry: the response is no chat completion.
    """
    try:
        response = json.loads(raw)
        message = response["choices"][0]["message"]
        text = message.get("content") or ""
        usage = response.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        if isinstance(text, str):
            return Answer(text, *tokens)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise Retry(f"answers with what is no chat completion ({raw[:60]!a})")


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says of an error, in one line."""
    try:
        raw = error.read(10_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        raw = ""
    try:
        said = json.loads(raw)["error"]
        raw = said["message"] if isinstance(said, dict) else said
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    return first_line(Exception(raw if isinstance(raw, str) and raw.strip() else error.reason))


def ask_all(endpoint: Endpoint, texts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
    """The answers to texts, each with the place of its text, as they come.

    Where a request fails for good, no other is begun, and those on their way are waited for.

    Raises:
      UserError: a request has failed; all answers that came have been given by then.
    """
    stop = threading.Event()

    def one(text: str) -> Answer | None:
        if stop.is_set():
            return None
        try:
            return endpoint.ask(text, stop)
        except Exception:
            stop.set()
            raise

    failed = None
    pool = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="judge")
    try:
        places = {pool.submit(one, text): i for i, text in enumerate(texts)}
        for future in as_completed(places):
            if (error := future.exception()) is not None:
                failed = failed or error
            elif (answer := future.result()) is not None:
                yield places[future], answer
        if failed is not None:
            raise failed
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
