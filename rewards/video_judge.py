"""A vision-language model marks each video by some of its frames."""

from __future__ import annotations

from typing import Any

from PIL import Image

from .frames import check_count, sampled
from .judge_endpoint import JudgeEndpoint
from .judge_marks import JudgeMarks

QUESTION = """\
These are frames of one video, in order, at equal distances. It was generated for the prompt: \
{prompt}

How well does it show what the prompt asks for, how plausible is the motion, and how well is it
made? Answer with JSON only: {"score": N}, with N from 0 (not at all) to 10 (perfectly)."""


class VideoJudge:
    """Score videos by the mark of a vision-language model behind an OpenAI-compatible endpoint.

    As ``image_judge``, with some frames of the video in one request. What happens between them is
    not seen: a flicker faster than that, for instance.

    Range [0, 1], higher is better. An answer that is not such an object, or off the scale, is asked
    for again; if it stays so, or the endpoint fails, the reward raises: nothing is counted as 0.
    Costs one request with ``frames`` pictures per video. What the model may be used for is a matter
    of its licence.

    Args:
        url: the endpoint, such as ``http://localhost:8000/v1``.
        model: the name under which it serves the model.
        frames: how many are shown, at equal distances; the first and the last are among them.
        question: what it is asked; ``{prompt}`` is replaced. Marks go from 0 to 10.
        api_key_env: name of the environment variable with the key, if one is needed.
        timeout_s: limit of one request, in seconds.
        retries: how often a request or an unreadable answer is repeated.
        wait_s: pause before the first repetition; it doubles each time.
        concurrency: requests under way at the same time.
        check: ask at the start whether the endpoint is there and serves the model.

    Raises:
        ConfigError: no endpoint, an unknown model, a missing key, or a bad option.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        frames: int = 8,
        question: str = QUESTION,
        api_key_env: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 3,
        wait_s: float = 0.5,
        concurrency: int = 8,
        check: bool = True,
    ) -> None:
        self.frames = check_count("video_judge", frames)
        endpoint = JudgeEndpoint(
            "video_judge", url, model, api_key_env=api_key_env, timeout_s=timeout_s,
            retries=retries, wait_s=wait_s, concurrency=concurrency, max_tokens=512, check=check,
        )  # fmt: skip
        self.marks = JudgeMarks("video_judge", endpoint, question, (0, 10))

    async def __call__(
        self, videos: list[list[Image.Image]], prompts: list[Any], **_columns: Any
    ) -> list[float | None]:
        """Score each video; see the class."""
        return list(await self.marks([sampled(video, self.frames) for video in videos], prompts))
