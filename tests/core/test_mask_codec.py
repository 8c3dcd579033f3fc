"""Masks as codes: residual quantisation against brute force, prefixes, and what is refused."""

import pytest
import torch

from mmgrpo.core.mask_codec import MaskCodec, MaskCodecConfig

CONFIG = MaskCodecConfig(canvas=(8, 12), num_codes=5, num_slots=4, latent=3, hidden=6)


@pytest.fixture
def codec():
    torch.manual_seed(0)
    codec = MaskCodec(CONFIG)
    codec.codebooks.copy_(torch.randn(4, 5, 3) * 0.5 ** torch.arange(4)[:, None, None])
    return codec.requires_grad_(False)


def test_codes_are_the_nearest_entries_to_what_is_left(codec):
    latents = torch.randn(6, 3)
    codes = codec.quantise(latents)
    for latent, found in zip(latents, codes.tolist(), strict=True):
        left = latent.clone()
        for book, code in zip(codec.codebooks, found, strict=True):
            assert code == min(range(5), key=lambda k: (left - book[k]).norm().item())
            left -= book[code]


def test_a_prefix_is_decoded_from_the_sum_of_its_own_entries(codec):
    codes = [4, 0, 2]
    for count in (1, 2, 3):
        latent = sum(codec.codebooks[slot, codes[slot]] for slot in range(count))
        expected = codec.logits(latent[None])[0]
        torch.testing.assert_close(codec.decode(codes[:count]), expected)
        summed = codec.look_up(torch.tensor([codes]), torch.tensor([count]))
        torch.testing.assert_close(summed[0], latent)
    assert codec.decode(codes).shape == (8, 12)
    assert not torch.equal(codec.decode([4, 0]), codec.decode([0, 4]))


def test_a_mask_has_the_same_codes_alone_and_among_others(codec):
    masks = torch.rand(7, 8, 12) > 0.5
    whole = codec.encode(masks)
    assert whole.shape == (7, 4)
    assert torch.equal(whole, torch.cat([codec.encode(mask[None]) for mask in masks]))


def test_enough_codes_reach_any_latent():
    """With the corners of a shrinking cube as codebooks the quantisation error is bounded."""
    config = MaskCodecConfig(canvas=(4, 4), num_codes=8, num_slots=12, latent=3, hidden=4)
    codec = MaskCodec(config)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    codec.codebooks.copy_(torch.stack([corners * 0.5**slot for slot in range(1, 13)]))
    latents = torch.rand(50, 3) * 2 - 1
    codes = codec.quantise(latents)
    for count in (1, 4, 12):
        error = latents - codec.look_up(codes, torch.full((50,), count))
        assert error.abs().max() <= 0.5**count + 1e-6


@pytest.mark.parametrize("codes", [[], [0] * 5, [5], [-1]])
def test_what_is_no_code_sequence_is_refused(codec, codes):
    with pytest.raises(ValueError, match="codes"):
        codec.decode(codes)
