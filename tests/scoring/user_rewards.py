"""Rewards as a user writes them, good and bad; loaded by path."""

import asyncio


def plain(prompts, completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def with_options(completions, answer, scale=1.0, *, offset=0.0):
    return [scale * float(c == a) + offset for c, a in zip(completions, answer, strict=True)]


def optional_column(completions, hint=None):
    return [0.0 if hint is None or h is None else 1.0 for h in hint or completions]


async def slow(completions, **columns):
    await asyncio.sleep(0.2)
    return [len(c) for c in completions]


class Bonus:
    def __init__(self, amount, unit=1):
        if amount < 0:
            raise ValueError("amount must not be negative")
        self.amount = amount * unit

    def __call__(self, completions, level):
        return [self.amount + n for n in level]


class AsyncBonus(Bonus):
    async def __call__(self, completions, **columns):
        return [self.amount] * len(completions)


class NotCallable:
    pass


NUMBER = 3
