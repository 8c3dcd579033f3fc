"""A vision-language model marks each picture."""

from __future__ import annotations

from typing import Any

from PIL import Image

from .judge_endpoint import JudgeEndpoint
from .judge_marks import JudgeMarks

QUESTION = """\
This picture was generated for the prompt: {prompt}

How well does it show what the prompt asks for, and how well is it made?
Answer with JSON only: {"score": N}, with N from 0 (not at all) to 10 (perfectly)."""


class ImageJudge:
    """Score pictures by the mark of a vision-language model behind an OpenAI-compatible endpoint.

    The model sees the question, in which ``{prompt}`` is replaced, and the picture, and answers
    ``{"score": N}``. Marks are brought from the scale to [0, 1].

    Range [0, 1], higher is better. An answer that is not such an object, or off the scale, is asked
    for again; if it stays so, or the endpoint fails, the reward raises: nothing is counted as 0.
    Costs one request per picture. What the model may be used for is a matter of its licence.

    Args:
        url: the endpoint, such as ``http://localhost:8000/v1``.
        model: the name under which it serves the model.
        question: what it is asked.
        scale: the worst and the best mark.
        api_key_env: name of the environment variable with the key, if one is needed.
        timeout_s: limit of one request, in seconds.
        retries: how often a request or an unreadable answer is repeated.
        wait_s: pause before the first repetition; it doubles each time.
        concurrency: requests under way at the same time.
        check: ask at the start whether the endpoint is there and serves the model.

    Raises:
        ConfigError: no endpoint, an unknown model, a missing key, or a bad scale or question.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        question: str = QUESTION,
        scale: tuple[float, float] = (0, 10),
        api_key_env: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        wait_s: float = 0.5,
        concurrency: int = 16,
        check: bool = True,
    ) -> None:
        endpoint = JudgeEndpoint(
            "image_judge", url, model, api_key_env=api_key_env, timeout_s=timeout_s,
            retries=retries, wait_s=wait_s, concurrency=concurrency, max_tokens=512, check=check,
        )  # fmt: skip
        self.marks = JudgeMarks("image_judge", endpoint, question, scale)

    async def __call__(
        self, images: list[Image.Image], prompts: list[Any], **_columns: Any
    ) -> list[float | None]:
        """Score each picture; see the class."""
        return list(await self.marks([[image] for image in images], prompts))
