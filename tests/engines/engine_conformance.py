"""What any engine of a token policy must do; subclass :class:`EngineConformance` to hold one to it.

The oracle is teacher forcing: transformers reads prompt and completion as one unpadded row.
"""

from __future__ import annotations

import pytest
import torch
from fixtures_tokens import distributions

LENGTH = 10
SETTINGS = ({}, {"temperature": 0.6}, {"temperature": 1.5})


class EngineConformance:
    """Tests of an engine. A subclass has two fixtures and may change the numbers.

    ``policy``: a float32 token policy whose weights the tests may change and put back;
    ``prompts``: at least three of different length, one of them as a chat;
    ``make_engine(policy, **settings)``: an engine with the sampling settings of the native one.
    """

    tolerance = 1e-4
    """How far a log-probability may be from the oracle's."""
    draws = 2000

    @pytest.fixture
    def make_engine(self):
        raise NotImplementedError

    def sample(self, make_engine, policy, prompts, *, group_size=4, seed=5, **settings):
        engine = make_engine(policy, **{"max_new_tokens": LENGTH, **settings})
        return engine.generate(prompts, group_size=group_size, seed=seed, version=3)

    # -- what it returns -------------------------------------------------------------------------

    def test_rows_are_groups_in_the_order_of_the_prompts(self, make_engine, policy, prompts):
        found = self.sample(make_engine, policy, prompts)
        owners = [prompt.index for prompt in prompts for _ in range(4)]
        assert found.trajectories.group.tolist() == owners
        assert [sample.prompt.index for sample in found.samples] == owners
        assert found.trajectories.version.tolist() == [3] * len(owners)
        lengths = found.trajectories.lengths.tolist()
        assert [sample.length for sample in found.samples] == lengths
        assert found.cost.decisions == sum(lengths)
        texts = policy.decode([row[:n] for row, n in zip(ids_of(found), lengths, strict=True)])
        assert [sample.completion for sample in found.samples] == texts

    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_log_probs_are_those_of_teacher_forcing(self, make_engine, policy, prompts, settings):
        found = self.sample(make_engine, policy, prompts, **settings).trajectories
        assert found.payload.temperature.tolist() == pytest.approx(
            [settings.get("temperature", 1.0)] * len(found)
        )
        expected = teacher_forced(policy, found)
        for name in ("old_log_prob", "rollout_log_prob"):
            value = getattr(found, name)
            if value is not None:
                torch.testing.assert_close(value, expected, atol=self.tolerance, rtol=0)
                assert value.dtype == torch.float32

    # -- sampling settings -----------------------------------------------------------------------

    def test_the_length_limit_is_kept_and_reported(self, make_engine, policy, prompts):
        engine = make_engine(policy, max_new_tokens=3)
        assert engine.room == 3
        found = self.sample(make_engine, policy, prompts, max_new_tokens=3).trajectories
        assert found.mask.shape[1] <= 3
        for ids, count, cut in zip(*columns(found), strict=True):
            assert cut == (ids[count - 1] not in policy.eos_ids)
            assert not cut or count == 3

    def test_a_completion_ends_with_its_first_end_token(self, make_engine, policy, prompts):
        found = self.sample(make_engine, policy, prompts, group_size=16).trajectories
        ended = 0
        for ids, count, cut in zip(*columns(found), strict=True):
            assert not set(ids[: count - 1]) & set(policy.eos_ids)
            ended += not cut
        assert 0 < ended < len(found)

    def test_a_stop_string_ends_a_completion_and_stays_in_it(self, make_engine, policy, prompts):
        free = self.sample(make_engine, policy, prompts, group_size=16)
        found = [digit for s in free.samples for digit in s.completion if digit in "0123456789"]
        stop = max(sorted(set(found)), key=found.count)  # a letter may stand in a special token
        found = self.sample(make_engine, policy, prompts, group_size=16, stop=(stop,))
        stopped = 0
        for before, after, cut in zip(
            free.samples, found.samples, found.trajectories.truncated.tolist(), strict=True
        ):
            whole = before.completion
            if stop in whole:
                assert after.completion == whole[: whole.index(stop) + len(stop)]
                assert not cut
                stopped += 1
        assert stopped

    def test_greedy_takes_the_likeliest_token(self, make_engine, policy, prompts):
        found = self.sample(make_engine, policy, prompts, temperature=0.0)
        for row in range(len(found.trajectories)):
            log_p = oracle(policy, found.trajectories, row)
            count = int(found.trajectories.lengths[row])
            chosen = log_p.gather(-1, completion(found.trajectories, row)[:, None])[:count, 0]
            assert (log_p.amax(-1)[:count] - chosen).max() < self.tolerance
        texts = [sample.completion for sample in found.samples]
        assert texts == [text for text in texts[::4] for _ in range(4)]

    @pytest.mark.parametrize(
        "settings",
        [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.05}, {"top_k": 4, "temperature": 1.5}],
        ids=str,
    )
    def test_filters_exclude_what_they_should(self, make_engine, policy, prompts, settings):
        found = self.sample(make_engine, policy, prompts, group_size=12, **settings).trajectories
        unusual = 0
        for row in range(len(found)):
            log_p = oracle(policy, found, row)[: int(found.lengths[row])]
            for log_q, token in zip(log_p, completion(found, row).tolist(), strict=False):
                above = log_q[log_q > log_q[token] + self.tolerance]
                assert len(above) < settings.get("top_k", len(log_q))
                assert above.exp().sum() < settings.get("top_p", 1.0) + self.tolerance
                ratio = (log_q[token] - log_q.max()).exp()
                assert ratio >= settings.get("min_p", 0.0) - self.tolerance
                unusual += len(above) > 0
        assert unusual  # it did not merely take the likeliest

    def test_tokens_are_drawn_by_their_probability(self, make_engine, policy, prompts):
        found = self.sample(
            make_engine, policy, prompts[:1], group_size=self.draws, max_new_tokens=1,
            temperature=0.8,
        ).trajectories  # fmt: skip
        drawn = found.payload.completion_ids[:, 0]
        expected = oracle(policy, found, 0)[0].exp() * self.draws
        counts = torch.bincount(drawn, minlength=len(expected))
        often = expected > 10
        chi2 = ((counts - expected)[often].square() / expected[often]).sum()
        degrees = int(often.sum())
        assert degrees > 2
        assert chi2 < degrees + 4.5 * (2 * degrees) ** 0.5
        rare = int(counts[~often].sum())
        assert abs(rare - expected[~often].sum()) < 5 * self.draws**0.5

    # -- seeds and batches -----------------------------------------------------------------------

    def test_the_seed_names_the_samples(self, make_engine, policy, prompts):
        first = self.sample(make_engine, policy, prompts)
        assert ids_of(self.sample(make_engine, policy, prompts)) == ids_of(first)
        assert ids_of(self.sample(make_engine, policy, prompts, seed=6)) != ids_of(first)
        assert len({tuple(row) for row in ids_of(first)}) > len(prompts)

    def test_a_sample_does_not_depend_on_its_batch(self, make_engine, policy, prompts):
        whole = by_name(self.sample(make_engine, policy, prompts).trajectories)
        reverse = by_name(self.sample(make_engine, policy, prompts[::-1]).trajectories)
        for prompt in prompts:
            few = self.sample(make_engine, policy, [prompt], group_size=2).trajectories
            alone = by_name(few)
            for name in alone:
                for ids, log_prob in (alone[name], reverse[name]):
                    assert ids == whole[name][0]
                    assert log_prob == pytest.approx(whole[name][1], abs=self.tolerance)

    # -- weights ---------------------------------------------------------------------------------

    def test_every_weight_that_changes_reaches_the_engine(self, make_engine, policy, prompts):
        settings = {"group_size": 2, "max_new_tokens": 4}
        generator = torch.Generator().manual_seed(0)
        before = self.sample(make_engine, policy, prompts, **settings).trajectories
        for name, parameter in policy.network.named_parameters():
            if not parameter.requires_grad:
                continue
            kept = parameter.detach().clone()
            noise = torch.randn(kept.shape, generator=generator) * (0.3 * kept.abs().mean() + 0.02)
            with torch.no_grad():
                parameter.add_(noise)
            found = self.sample(make_engine, policy, prompts, **settings).trajectories
            expected = teacher_forced(policy, found)
            with torch.no_grad():
                parameter.copy_(kept)
            gap = (numbers(found) - expected).abs().max()
            assert gap < self.tolerance, name
        after = self.sample(make_engine, policy, prompts, **settings).trajectories
        assert ids_of(after) == ids_of(before)
        torch.testing.assert_close(numbers(after), numbers(before), atol=self.tolerance, rtol=0)


def numbers(trajectories):
    """``[B, T]``: the log-probabilities that the engine itself gives."""
    engine = trajectories.rollout_log_prob
    return trajectories.old_log_prob if engine is None else engine


def oracle(policy, trajectories, row):
    """``[T, V]`` log-probabilities of a row's tokens, those that cannot be sampled left out."""
    payload = trajectories.payload
    prompt = payload.prompts.select(payload.prompt_row[row : row + 1])
    with torch.no_grad():
        log_p = distributions(policy.model, trajectories, row, **prompt.inputs())
    return log_p.index_fill(-1, policy.forbidden, -torch.inf).log_softmax(-1)


def teacher_forced(policy, trajectories):
    """``[B, T]`` log-probabilities of the tokens, 0 where the mask is off."""
    rows = [
        oracle(policy, trajectories, row).gather(-1, completion(trajectories, row)[:, None])[:, 0]
        for row in range(len(trajectories))
    ]
    return torch.where(trajectories.mask, torch.stack(rows), 0.0)


def completion(trajectories, row):
    return trajectories.payload.completion_ids[row]


def ids_of(found):
    """The sampled tokens of each row."""
    trajectories = getattr(found, "trajectories", found)
    ids, lengths = trajectories.payload.completion_ids.tolist(), trajectories.lengths.tolist()
    return [row[:n] for row, n in zip(ids, lengths, strict=True)]


def columns(trajectories):
    """Tokens, lengths and whether a row was cut off."""
    return (
        trajectories.payload.completion_ids.tolist(),
        trajectories.lengths.tolist(),
        trajectories.truncated.tolist(),
    )


def by_name(trajectories):
    """(prompt index, sample number) -> tokens and their log-probabilities."""
    counts, result = {}, {}
    for group, ids, log_prob in zip(
        trajectories.group.tolist(), ids_of(trajectories), numbers(trajectories).tolist(),
        strict=True,
    ):  # fmt: skip
        number = counts[group] = counts.get(group, -1) + 1
        result[group, number] = ids, log_prob[: len(ids)]
    return result
