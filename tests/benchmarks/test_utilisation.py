"""What the benchmark of the language models' steps counts and prints."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import utilisation
from systems import SIZES
from versus_trl import Case

VOCABULARY = 151936


@pytest.mark.parametrize("size", SIZES)
def test_a_token_takes_two_operations_for_each_weight_of_a_product(size):
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES[size], vocab_size=VOCABULARY))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    case = Case(1, 1, VOCABULARY, size)
    assert utilisation.forward_flops(case, tokens=1, heads=1, pairs=0) == 2 * weights


def test_the_largest_has_the_published_size():
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES["1.5B"], vocab_size=VOCABULARY))
    inner = model.num_parameters() - model.lm_head.weight.numel()  # Qwen2.5-1.5B ties its head
    assert 1.5e9 < inner < 1.6e9


def test_a_run_prints_its_parts_and_what_a_step_is_made_of(monkeypatch, capsys):
    options = "--device cpu --size small --prompt 8 --completion 4 --vocabulary 300 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["x", *options.split(), "--threads", "1"])
    utilisation.main()
    lines = capsys.readouterr().out.splitlines()
    case, generation, update, step = lines[-4:]
    assert case.startswith("small, P=8, C=4, V=300, float32 on cpu; matrix products reach ")
    assert generation.startswith("generate: ")
    assert update.startswith("update: ")
    shares = [float(part.rpartition(" ")[2].rstrip("%")) for part in step.split(", ")]
    assert len(shares) == len(utilisation.PARTS) + 1
    assert all(0 < share < 100 for share in shares)
    assert sum(shares) == pytest.approx(100, abs=0.3)
