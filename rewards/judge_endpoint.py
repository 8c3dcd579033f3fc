"""Ask a vision-language model behind an OpenAI-compatible HTTP endpoint about pictures."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from mmgrpo.errors import ConfigError, MissingResourceError, nearest

_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_START_TIMEOUT_S = 10.0


class JudgeFailure(RuntimeError):
    """The endpoint did not answer, or not as the interface prescribes."""


class JudgeEndpoint:
    """The judge's address and how to talk to it; only JSON goes either way.

    Args:
        reward: name of the reward, for errors.
        url: up to and without ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: the name under which the endpoint serves the model.
        api_key_env: name of the environment variable with the key, if one is needed.
        timeout_s: limit of one request, in seconds.
        retries: how often a request is repeated that got no usable answer.
        wait_s: pause before the first repetition; it doubles each time.
        concurrency: requests under way at the same time.
        max_tokens: limit of an answer.
        check: ask at the start whether the endpoint is there and serves the model.

    Raises:
        ConfigError: the address is none, the key is not set, or the check failed.
    """

    def __init__(
        self,
        reward: str,
        url: str,
        model: str,
        *,
        api_key_env: str | None,
        timeout_s: float,
        retries: int,
        wait_s: float,
        concurrency: int,
        max_tokens: int,
        check: bool,
    ) -> None:
        if not re.match(r"https?://[^/]", url):
            raise ConfigError(f"{reward}: url must start with http:// or https://; got '{url}'.")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ConfigError(f"{reward}: the environment variable {api_key_env} is not set.")
        self.reward, self.url, self.model = reward, url.rstrip("/"), model
        self.timeout_s, self.retries, self.wait_s = timeout_s, retries, wait_s
        self.max_tokens = max_tokens
        self.headers = {"Content-Type": "application/json"}
        if api_key_env is not None:
            self.headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix=reward)
        if check:
            self._check()

    async def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """Return what the model answers to a question followed by pictures.

        Raises:
            JudgeFailure: no usable answer, after all repetitions.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        content += [{"type": "image_url", "image_url": {"url": _data(image)}} for image in images]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "response_format": {"type": "json_object"},
        }
        loop = asyncio.get_running_loop()
        for attempt in range(self.retries + 1):
            try:
                answer = await loop.run_in_executor(
                    self._pool, self._request, "/chat/completions", body, self.timeout_s
                )
                return _content(answer)
            except _TransientError as error:
                if attempt == self.retries:
                    times = f" {attempt + 1} times" if attempt else ""
                    raise JudgeFailure(f"the judge at {self.url} failed{times}: {error}") from error
            await asyncio.sleep(self.wait_s * 2**attempt)
        raise AssertionError("unreachable")

    def _request(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        """The decoded JSON of a response. Only failures that may pass are _TransientError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)  # noqa: S310 - http(s)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(500).decode(errors="replace").split())
            message = f"HTTP status {error.code} ({said or error.reason})"
            if error.code in (408, 409, 429) or error.code >= 500:
                raise _TransientError(message) from error
            raise JudgeFailure(f"the judge at {self.url} answered with {message}") from error
        except TimeoutError as error:
            raise _TransientError(f"no answer within {timeout_s:g} s") from error
        except OSError as error:  # URLError, refused and broken connections
            raise _TransientError(str(getattr(error, "reason", error))) from error
        except ValueError as error:
            raise _TransientError("the response is not JSON") from error

    def _check(self) -> None:
        try:
            answer = self._request("/models", None, min(self.timeout_s, _START_TIMEOUT_S))
            served = [entry["id"] for entry in answer["data"]]
        except _TransientError as error:
            raise MissingResourceError(
                f"{self.reward}: no OpenAI-compatible endpoint answers at '{self.url}' ({error})."
            ) from error
        except JudgeFailure as error:
            if "status 401" in str(error) or "status 403" in str(error):
                raise ConfigError(f"{self.reward}: {error}; see api_key_env.") from error
            return  # it is there, and need not list its models
        except (KeyError, TypeError):
            return
        if served and self.model not in served:
            raise ConfigError(
                f"{self.reward}: '{self.url}' does not serve '{self.model}'"
                f"{nearest(self.model, served)}"
            )


class _TransientError(Exception):
    """A request failed in a way that may pass."""


def read_object(answer: str) -> dict[str, Any] | None:
    """Return the JSON object that an answer consists of, in a code fence or not; None if not.

    >>> read_object('{"score": 7}')
    {'score': 7}
    """
    fenced = _FENCE.fullmatch(answer.strip())
    try:
        found = json.loads(fenced[1] if fenced else answer)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _content(answer: Any) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise _TransientError("the response has no choices[0].message.content") from None
    return content if isinstance(content, str) else ""


def _data(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
