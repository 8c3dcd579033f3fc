"""The text policy and folders: what it loads, what it refuses, what it exports and reads back."""

import json
import shutil

import pytest
import torch
from fixtures_tokens import text_prompts, tiny_text, tiny_vision, trajectories_of
from safetensors.torch import load_file, save_file

from mmgrpo.errors import ConfigError, ModelError
from mmgrpo.policies.adapters import trainable_parameters
from mmgrpo.policies.autoregressive import AutoregressivePolicy

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = tiny_text()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_gives_the_policy_of_its_model(folder):
    policy = AutoregressivePolicy(tiny_text())
    trajectories = trajectories_of(policy, text_prompts(), [0, 0, 0, 1, 2, 2])
    torch.testing.assert_close(
        AutoregressivePolicy(folder).evaluate(trajectories).log_prob,
        policy.evaluate(trajectories).log_prob,
    )


def remove(*patterns):
    def spoil(folder):
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return spoil


def claim_another_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "The model folder .*model does not exist"),
        (remove("config.json"), "has no (tokenizer|model configuration)"),
        (remove("tokenizer*", "chat_template*"), "has no tokenizer"),
        (remove("*.safetensors"), "Cannot load the weights"),
        (claim_another_kind, "holds a t5 model, which AutoModelForCausalLM cannot load"),
    ],
)
def test_an_incomplete_folder_is_refused_in_one_sentence(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        AutoregressivePolicy(str(folder))
    assert "\n" not in str(caught.value)


def test_a_misspelt_folder_gets_the_nearest(folder):
    with pytest.raises(ModelError, match="did you mean 'model'"):
        AutoregressivePolicy(folder.with_name("modle"))


def test_a_hub_id_that_cannot_be_had_is_no_folder():
    with pytest.raises(ModelError, match="nobody/nothing is no local folder, and the hub"):
        AutoregressivePolicy("nobody/nothing")


def test_a_vision_model_is_not_a_text_model(tmp_path):
    model, processor = tiny_vision()
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds a qwen2_vl model"):
        AutoregressivePolicy(tmp_path)


def test_wrong_options_are_named(folder):
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        AutoregressivePolicy(folder, dtype="bf16")
    with pytest.raises(ConfigError, match="Unknown reference 'frozen'"):
        AutoregressivePolicy(folder, reference="frozen")


def test_an_export_opens_with_plain_transformers(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoregressivePolicy(folder)
    with torch.no_grad():
        next(policy.model.parameters()).mul_(1.1)
    policy.export(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids).logits, policy.model(ids).logits)


def test_an_adapter_export_opens_with_plain_peft(folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = AutoregressivePolicy(folder, lora=LORA)
    with torch.no_grad():
        for parameter in trainable_parameters(policy.network).values():
            parameter.add_(0.1)
    policy.export(tmp_path / "out")
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids).logits, policy.network(ids).logits)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_an_export_can_be_loaded_back_into_the_same_tensors(folder, tmp_path, lora):
    policy = AutoregressivePolicy(folder, lora=lora)
    trained = trainable_parameters(policy.network)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    saved = {name: p.clone() for name, p in trained.items()}
    policy.export(tmp_path / "out")
    with torch.no_grad():
        for parameter in trained.values():
            parameter.zero_()
    policy.load_export(tmp_path / "out")
    for name, parameter in trainable_parameters(policy.network).items():
        assert parameter is trained[name]
        assert torch.equal(parameter, saved[name])


def test_weights_that_do_not_fit_are_refused(folder, tmp_path):
    policy = AutoregressivePolicy(folder, lora=LORA)
    with pytest.raises(ModelError, match="does not exist"):
        policy.load_export(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="do not fit"):
        policy.load_export(folder)
    other, tokenizer = tiny_text(hidden_size=16)
    AutoregressivePolicy((other, tokenizer)).export(tmp_path / "other")
    with pytest.raises(ModelError, match="do not fit"):
        AutoregressivePolicy(folder).load_export(tmp_path / "other")


def test_an_adapter_with_a_weight_too_many_is_refused(folder, tmp_path):
    policy = AutoregressivePolicy(folder, lora=LORA)
    policy.export(tmp_path / "out")
    file = tmp_path / "out/adapter_model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if "layers.1." in key)
    save_file({**weights, name.replace("layers.1.", "layers.7."): weights[name] + 1}, file)
    with pytest.raises(ModelError, match=r"do not fit this model: '.*layers\.7\..*' is not in the"):
        policy.load_export(tmp_path / "out")
