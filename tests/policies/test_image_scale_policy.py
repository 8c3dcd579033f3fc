"""Next-scale policies: likelihoods against scale-by-scale calls, enumeration and a plain latent."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from fixtures_scales import PROMPTS, tiny_scales
from safetensors.torch import load_file, save_file

from mmgrpo.config.scale_shape import read_shape
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import DataError, MethodError, ModelError
from mmgrpo.policies.image_scales import ImageScalesPolicy
from mmgrpo.policies.scale_model import ScaleModel
from mmgrpo.protocols import Prompt, Request
from mmgrpo.rollout.image_scales import ImageScalesEngine

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def policy():
    return ImageScalesPolicy(tiny_scales())


def draw(policy, *, prompts=PROMPTS, group_size=3, seed=1, temperature=1.0):
    engine = ImageScalesEngine(policy, temperature=temperature)
    return engine.generate(prompts, group_size=group_size, seed=seed)


def made_up(policy, codes, prompts=PROMPTS[:1], temperature=1.0):
    """Trajectories of given codes for one prompt."""
    row = torch.zeros(len(codes), dtype=torch.int64)
    payload = policy.payload(policy.encode(prompts), row, codes, temperature)
    return Trajectories(group=row, mask=torch.ones_like(codes).bool(), payload=payload)


# -- the quantiser -------------------------------------------------------------------------------


def test_inputs_are_the_upsampled_sum_of_earlier_scales(policy):
    """One picture by hand: bicubic up to the last grid, corrected, summed, averaged down."""
    quantiser, shape = policy.quantiser, policy.model.shape
    codes = torch.tensor([[4, 0, 3, 1, 1, 2, 0, 4, 2]])
    found = quantiser.inputs(codes)
    assert found.shape == (1, 9, 4)
    assert found.dtype == torch.float32
    assert not found[:, :1].any()
    table, latent, start = quantiser.codebook.weight, torch.zeros(1, 4, 2, 3), 0
    for number, (rows, columns) in enumerate(shape.scales):
        grid = codes[0, start : start + rows * columns].view(rows, columns)
        if number:
            pooled = F.adaptive_avg_pool2d(latent, (rows, columns))
            for i, j in itertools.product(range(rows), range(columns)):
                place = start + i * columns + j
                torch.testing.assert_close(found[0, place], pooled[0, :, i, j])
        small = torch.stack([torch.stack([table[c] for c in row]) for row in grid])
        large = F.interpolate(small.permute(2, 0, 1)[None], size=(2, 3), mode="bicubic")
        latent = latent + (large + quantiser.corrections[number](large)) / 2
        start += rows * columns
    pixels = quantiser.decoder(latent)
    torch.testing.assert_close(quantiser.decode(codes), pixels)
    assert pixels.shape == (1, 3, 4, 6)


def test_scales_encode_what_is_left_over(policy):
    """Without corrections, one scale more never takes the sum further from the latent."""
    quantiser = tiny_scales().quantiser
    for correction in quantiser.corrections:
        torch.nn.init.dirac_(correction.weight)
        torch.nn.init.zeros_(correction.bias)
    quantiser.codebook.weight.data[0] = 0.0  # a scale may add nothing
    latent = torch.randn(6, 4, 2, 3)
    before = [latent]
    for number, (wanted, codes, total) in enumerate(quantiser.residuals(latent)):
        torch.testing.assert_close(wanted, quantiser.shrink(before[-1], number))
        nearest = torch.cdist(wanted, quantiser.codebook.weight[None]).argmin(-1)
        assert torch.equal(codes, nearest)
        before.append(latent - total)
    last, third = before[-1].square().mean(), before[-2].square().mean()
    assert last < third  # on its own grid, the last scale is a plain nearest neighbour
    codes = quantiser.encode(torch.randn(2, 3, 4, 6))
    assert codes.shape == (2, 9)
    torch.testing.assert_close(sum(quantiser.contributions(codes)).shape, (2, 4, 2, 3))


# -- likelihoods ---------------------------------------------------------------------------------


def test_one_forward_gives_what_scale_by_scale_gave(policy):
    """In any batch, whatever stands beside a row, at any temperature."""
    for temperature in (1.0, 0.7):
        rollout = draw(policy, temperature=temperature)
        trajectories = rollout.trajectories
        assert rollout.cost.forwards == 3
        before = policy.forwards
        for rows in ([0], [4, 1], [5, 3, 2, 1, 0]):
            part = trajectories.select(torch.tensor(rows))
            found = policy.evaluate(part).log_prob
            torch.testing.assert_close(found, part.old_log_prob, **CLOSE)
        assert policy.forwards - before == 3


def test_all_pictures_sum_to_one():
    policy = ImageScalesPolicy(tiny_scales(scales=[[1, 1], [1, 2], [1, 3]], num_codes=3))
    codes = torch.tensor([*itertools.product(range(3), repeat=6)])
    found = policy.evaluate(made_up(policy, codes)).log_prob.double()
    assert found.sum(dim=1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert found.std() > 0.3  # far from uniform, which would hide mistakes


def test_places_of_a_scale_are_independent_and_see_no_later_scale(policy):
    codes = torch.tensor([[1, 2, 3, 0, 1, 2, 3, 4, 0]])
    plain = policy.logits(policy.encode(PROMPTS[:1]), torch.tensor([0]), codes)
    for place, first_changed in ((8, 9), (3, 9), (2, 3), (1, 3), (0, 1)):
        other = codes.clone()
        other[0, place] = (other[0, place] + 1) % 5
        moved = policy.logits(policy.encode(PROMPTS[:1]), torch.tensor([0]), other)
        changed = (moved - plain).abs().amax(dim=-1)[0] > 1e-4
        assert changed.tolist() == [p >= first_changed for p in range(9)]


def test_the_prompt_decides(policy):
    """Each letter and its place, and not the padding beside a longer prompt."""
    codes = torch.zeros(1, 9, dtype=torch.int64)
    alone = {
        text: policy.logits(policy.encode([Prompt(0, text)]), torch.tensor([0]), codes)
        for text in ("no 42", "no 24", "no 43")
    }
    assert (alone["no 42"] - alone["no 24"]).abs().max() > 1e-3
    assert (alone["no 42"] - alone["no 43"]).abs().max() > 1e-3
    both = policy.encode([Prompt(0, "a long one"), Prompt(1, "no 42")])
    padded = policy.logits(both, torch.tensor([1]), codes)
    torch.testing.assert_close(padded, alone["no 42"], rtol=0, atol=2e-5)


def test_classes_in_place_of_texts():
    policy = ImageScalesPolicy(tiny_scales(classes=["cat", "dog"]))
    encoded = policy.encode([Prompt(0, "dog"), Prompt(1, "cat")])
    assert encoded.ids.tolist() == [[1], [0]]
    with pytest.raises(DataError, match=r"Row 4: .*'dgo'.*did you mean 'dog'"):
        policy.check([Prompt(4, "dgo")])


def test_masked_codes_have_no_number_and_entropy_is_the_mean_surprise(policy):
    trajectories = draw(policy).trajectories
    mask = trajectories.mask.clone()
    mask[0], mask[1, 4] = False, False
    part = policy.evaluate(trajectories.replace(mask=mask), Request(entropy=True))
    torch.testing.assert_close(part.log_prob, trajectories.old_log_prob * mask, **CLOSE)
    assert not part.entropy[~mask].any()
    payload = trajectories.payload
    logits = policy.logits(payload.prompts, payload.prompt_row, payload.completion_ids)
    wanted = torch.distributions.Categorical(logits=logits).entropy() * mask
    torch.testing.assert_close(part.entropy, wanted, **CLOSE)
    nothing = policy.evaluate(trajectories.replace(mask=torch.zeros_like(mask)))
    assert nothing.log_prob.requires_grad
    assert not nothing.log_prob.any()
    with pytest.raises(MethodError, match="divergence"):
        policy.evaluate(trajectories, Request(divergence="exact"))


def test_the_gradient_is_the_slope(policy):
    """A finite difference in float64 along a random direction; checkpointing changes nothing."""
    found = {}
    for twice in (False, True):
        policy = ImageScalesPolicy(tiny_scales(), gradient_checkpointing=twice)
        policy.network.double()
        trajectories = draw(policy, group_size=1).trajectories
        parameters = [*policy.network.parameters()]
        generator = torch.Generator().manual_seed(3)
        steps = [torch.randn(p.shape, generator=generator).double() for p in parameters]
        value = policy.evaluate(trajectories).log_prob.double().sum()
        slopes = torch.autograd.grad(value, parameters)
        found[twice] = sum(float((g * s).sum()) for g, s in zip(slopes, steps, strict=True))
        sides = []
        for sign in (1, -2):
            with torch.no_grad():
                for p, s in zip(parameters, steps, strict=True):
                    p.add_(sign * 3e-4 * s)
                sides.append(float(policy.evaluate(trajectories).log_prob.double().sum()))
        assert (sides[0] - sides[1]) / 6e-4 == pytest.approx(found[twice], rel=2e-2)
    assert found[True] == pytest.approx(found[False], rel=1e-9)


# -- weights -------------------------------------------------------------------------------------


def test_a_folder_is_loaded_as_it_was_saved(policy, tmp_path):
    policy.export(tmp_path / "one")
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"config.json", "model.safetensors"}
    again = ImageScalesPolicy(tmp_path / "one")
    trajectories = draw(policy).trajectories
    assert torch.equal(
        policy.evaluate(trajectories).log_prob, again.evaluate(trajectories).log_prob
    )
    codes = trajectories.payload.completion_ids
    assert policy.draw(codes)[0].tobytes() == again.draw(codes)[0].tobytes()
    again.export(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert not any(p.requires_grad for p in again.quantiser.parameters())


def test_weights_move_between_policies(policy, tmp_path):
    other = ImageScalesPolicy(tiny_scales(seed=5))
    policy.export(tmp_path)
    other.load_export(tmp_path)
    for one, two in zip(policy.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ModelError, match="do not fit"):
        ImageScalesPolicy(tiny_scales(num_layers=1)).load_export(tmp_path)


def test_an_adapter_trains_and_its_absence_is_the_reference(tmp_path):
    pytest.importorskip("peft")
    policy = ImageScalesPolicy(tiny_scales(), lora={"rank": 2, "alpha": 4.0})
    trained = [name for name, p in policy.network.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any(".head." in name for name in trained)
    trajectories = draw(policy).trajectories
    before = policy.evaluate(trajectories).log_prob
    torch.testing.assert_close(before, trajectories.old_log_prob, **CLOSE)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    moved = policy.evaluate(trajectories).log_prob
    assert not torch.allclose(moved, before, atol=1e-3)
    with policy.reference():
        torch.testing.assert_close(policy.evaluate(trajectories).log_prob, before)
    policy.export(tmp_path)
    other = ImageScalesPolicy(tiny_scales(), lora={"rank": 2, "alpha": 4.0}, seed=9)
    other.load_export(tmp_path)
    torch.testing.assert_close(other.evaluate(trajectories).log_prob, moved)


def test_a_copy_is_the_reference_of_whole_weights(policy):
    held = ImageScalesPolicy(tiny_scales(), reference="copy")
    trajectories = draw(held).trajectories
    with torch.no_grad():
        held.model.transformer.head.bias.add_(torch.arange(5.0))
    with held.reference():
        found = held.evaluate(trajectories).log_prob
    torch.testing.assert_close(found, trajectories.old_log_prob, **CLOSE)
    assert not torch.allclose(held.evaluate(trajectories).log_prob, found, atol=0.1)


# -- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2"}, "holds a 'qwen2' model; expected model_type 'image_scales'"),
        ({"num_code": 3}, "unknown key 'num_code'; did you mean 'num_codes'"),
        ({"scales": [[2, 2], [1, 2]]}, "scales must grow from coarse to fine"),
        ({"num_heads": 3}, "hidden_size must be a multiple of num_heads 3; got 16"),
        ({"num_codes": 0}, "num_codes: Input should be greater than 0"),
    ],
)
def test_a_wrong_config_is_one_sentence(tmp_path, changes, words):
    tiny_scales().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ModelError) as caught:
        read_shape(tmp_path)
    assert words in str(caught.value)


def test_a_wrong_folder_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"has no config.json"):
        ImageScalesPolicy(tmp_path)
    tiny_scales().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "other": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="'other' is not in the model"):
        ScaleModel.from_pretrained(tmp_path)
    weights.pop("transformer.head.bias")
    save_file(weights, file)
    with pytest.raises(ModelError, match="Cannot load the weights"):
        ScaleModel.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match="Cannot load the weights"):
        ScaleModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt(2, "a prompt too long"), "Row 2: the prompt has 17 bytes; expected 1 to 12"),
        (Prompt(2, ""), "has 0 bytes"),
        (Prompt(2, [{"role": "user", "content": "a"}]), "plain text"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_named(policy, prompt, words):
    with pytest.raises(DataError, match=words):
        policy.check([prompt], room=0)


def test_the_prompt_budget_is_bytes(policy):
    assert policy.encode([Prompt(0, "é")]).ids.tolist() == [[0xC3, 0xA9]]
    assert math.prod(policy.encode(PROMPTS).ids.shape) == 16
