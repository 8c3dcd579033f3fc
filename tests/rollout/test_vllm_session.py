"""Weights on their way to vLLM, without vLLM: digests, stamps, and what is refused."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from fixtures_tokens import text_prompts, tiny_text, tiny_vision
from safetensors.torch import load_file

from mmgrpo.errors import ConfigError, MissingExtraError, MmgrpoError
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.rollout.vllm_arguments import engine_arguments, server_flags
from mmgrpo.rollout.vllm_client import VllmClient
from mmgrpo.rollout.vllm_engine import VllmEngine
from mmgrpo.rollout.vllm_local import LocalVllm
from mmgrpo.rollout.vllm_session import Completion, VllmSession
from mmgrpo.rollout.vllm_weights import (
    Stamp,
    adapter_weights,
    digest,
    model_weights,
    read_weights,
    write_weights,
)
from mmgrpo.rollout.vllm_worker import WeightReceiver

# -- digest ---------------------------------------------------------------------------------------


def tensors():
    return {
        "a": torch.randn(5, 3),
        "b": torch.randn(40).bfloat16(),
        "c": torch.arange(6),
        "d": torch.tensor(1.5),
    }


def flip(value):
    """Change the lowest bit of the last number."""
    words = value.view(-1).view(torch.uint8)
    words[-value.element_size()] ^= 1


@pytest.mark.parametrize(
    "change",
    [
        lambda t: flip(t["a"]),
        lambda t: flip(t["b"]),
        lambda t: flip(t["d"]),
        lambda t: t.pop("c"),
        lambda t: t.update(e=torch.zeros(0)),
        lambda t: t.update(a=t["a"].flip(0)),
        lambda t: t.update(a=t["a"].T.contiguous()),
        lambda t: t.update(a=t["a"].view(3, 5)),
        lambda t: t.update(a=t.pop("b"), b=t["a"]),
        lambda t: t.update(a=t["a"].view(torch.int32)),
    ],
    ids=range(10),
)
def test_a_digest_sees_every_bit_name_shape_and_place(change):
    given = tensors()
    before = digest(given)
    assert digest(dict(reversed(given.items()))) == before
    assert digest({name: value.clone() for name, value in given.items()}) == before
    change(given)
    assert digest(given) != before


def test_a_digest_reads_strided_and_large_tensors():
    wide = torch.randn(7, 9)
    assert digest({"a": wide[:, ::2]}) == digest({"a": wide[:, ::2].contiguous()})
    large = torch.zeros((1 << 22) + 5, dtype=torch.int8)
    before = digest({"a": large})
    large[-1] = 1
    assert digest({"a": large}) != before


def test_weights_survive_the_disk(tmp_path):
    given = tensors()
    write_weights(tmp_path / "x" / "model.safetensors", given)
    assert digest(read_weights(tmp_path / "x" / "model.safetensors")) == digest(given)
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("make", [tiny_text, tiny_vision])
def test_model_weights_are_the_checkpoint(make, tmp_path):
    model, _ = make(tie_word_embeddings=True) if make is tiny_text else make()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = model_weights(model)
    assert found.keys() == saved.keys()
    assert digest(found) == digest(saved)


def test_adapter_weights_are_the_adapter_s_file(tmp_path):
    pytest.importorskip("peft")
    policy = AutoregressivePolicy(tiny_text(), lora={"rank": 2, "alpha": 4.0})
    policy.export(tmp_path)
    assert digest(adapter_weights(policy.network)) == digest(
        load_file(tmp_path / "adapter_model.safetensors")
    )


# -- worker ---------------------------------------------------------------------------------------


class Worker(WeightReceiver):
    """A worker that holds what it was given, and can break half-way."""

    def __init__(self, breaks=False):
        self.model_runner = self
        self.loaded, self.breaks = {}, breaks

    def get_model(self):
        return torch.nn.Module()

    def reload_weights(self, weights_iterator):
        for number, (name, value) in enumerate(weights_iterator):
            if self.breaks and number == 1:
                raise RuntimeError("out of memory")
            self.loaded[name] = value.clone()


def test_a_worker_is_stamped_after_everything_is_loaded(tmp_path):
    given, worker = tensors(), Worker()
    assert worker.mmgrpo_stamp() == Stamp().as_dict()
    held = worker.mmgrpo_load(given, 7, digest(given))
    assert held == worker.mmgrpo_stamp() == Stamp(7, digest(given)).as_dict()
    write_weights(tmp_path / "model.safetensors", given)
    other = Worker()
    assert other.mmgrpo_load(str(tmp_path), 7, digest(given)) == held
    assert digest(other.loaded) == digest(given)


@pytest.mark.parametrize("fault", ["breaks", "wrong digest", "no file", "cut file"])
def test_a_worker_with_half_the_weights_has_no_stamp(fault, tmp_path):
    given, worker = tensors(), Worker()
    worker.mmgrpo_load(given, 1, digest(given))
    worker.breaks = fault == "breaks"
    expected = "0" * 64 if fault == "wrong digest" else digest(given)
    if fault != "no file":
        write_weights(tmp_path / "model.safetensors", given)
    if fault == "cut file":
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    held = worker.mmgrpo_load(str(tmp_path), 2, expected)
    assert held["digest"] == ""
    assert held["version"] == -1
    assert held["error"]


# -- session --------------------------------------------------------------------------------------


class Backend:
    """Workers in this process; completions come from a script."""

    def __init__(self, workers=2, completions=None):
        self.workers = [Worker() for _ in range(workers)]
        self.calls, self.completions = [], completions or (lambda request: [])
        self.during = lambda: None

    def stamps(self):
        return [Stamp(**worker.mmgrpo_stamp()) for worker in self.workers]

    def load(self, tensors, version, expected):
        self.calls.append(("load", version))
        for worker in self.workers:
            worker.mmgrpo_load(dict(tensors), version, expected)

    def load_adapter(self, tensors, config, version, expected):
        self.calls.append(("adapter", version))
        for worker in self.workers:
            worker.mmgrpo_held = Stamp(version, expected, "name")

    def generate(self, requests, sampling, adapter):
        self.calls.append(("generate", adapter))
        self.during()
        return [self.completions(request) for request in requests]

    def wake(self):
        self.calls.append(("wake",))

    def sleep(self, *, keep_weights):
        self.calls.append(("sleep", keep_weights))


@pytest.fixture
def policy():
    return AutoregressivePolicy(tiny_text())


def test_weights_travel_when_they_have_changed_and_only_then(policy):
    backend = Backend()
    session = VllmSession(policy, backend)
    for version in (0, 1):
        session.generate([], {}, version=version)
    assert backend.calls == [
        ("wake",), ("load", 0), ("generate", ""), ("sleep", False),
        ("wake",), ("generate", ""), ("sleep", False),
    ]  # fmt: skip
    with torch.no_grad():
        next(policy.network.parameters()).add_(1e-6)
    session.generate([], {}, version=2)
    assert ("load", 2) in backend.calls
    assert digest(backend.workers[0].loaded) == digest(model_weights(policy.model))
    backend.workers[1] = Worker()  # somebody started it again
    session.generate([], {}, version=3)
    assert ("load", 3) in backend.calls


def test_an_adapter_travels_alone():
    pytest.importorskip("peft")
    policy = AutoregressivePolicy(tiny_text(), lora={"rank": 2, "alpha": 4.0})
    backend = Backend()
    VllmSession(policy, backend).generate([], {}, version=4)
    assert backend.calls[1:] == [("adapter", 4), ("generate", "name"), ("sleep", True)]


def test_one_worker_with_other_weights_stops_the_run(policy):
    backend = Backend()
    backend.workers[1].breaks = True
    with pytest.raises(MmgrpoError, match=r"1 of 2 workers hold other weights.*out of memory"):
        VllmSession(policy, backend).generate([], {}, version=0)
    assert ("generate", "") not in backend.calls


def test_weights_that_change_while_sampling_stop_the_run(policy):
    backend = Backend()
    backend.during = lambda: backend.workers[0].mmgrpo_load({}, 9, digest({}))
    with pytest.raises(MmgrpoError, match=r"while it was sampling.*version 9"):
        VllmSession(policy, backend).generate([], {}, version=0)


# -- engine ---------------------------------------------------------------------------------------


def test_the_engine_keeps_its_own_numbers_and_the_policy_s(policy):
    def answer(request):
        return [Completion([65, 66], [-1.0, -2.0], True), Completion([67], [-5.0], False)]

    engine = VllmEngine(policy, VllmSession(policy, Backend(completions=answer)), max_new_tokens=4)
    found = engine.generate(text_prompts(), group_size=2, seed=0, version=5)
    rows = found.trajectories
    assert rows.rollout_log_prob.tolist() == [[-1.0, -2.0], [-5.0, 0.0]] * 3
    torch.testing.assert_close(rows.old_log_prob, policy.evaluate(rows).log_prob)
    assert rows.entropy is not None
    assert rows.truncated.tolist() == [False, True] * 3
    assert found.cost.forwards > 0
    worst = found.samples[0].mismatch
    gaps = [abs(token["old_log_prob"] - token["rollout_log_prob"]) for token in worst]
    assert gaps == sorted(gaps, reverse=True)
    assert {token["token"] for token in worst} == {"b", "c"}
    cheap = VllmEngine(
        policy, VllmSession(policy, Backend(completions=answer)), max_new_tokens=4, evaluate=False
    ).generate(text_prompts(), group_size=2, seed=0)
    assert cheap.trajectories.old_log_prob is None
    assert cheap.samples[0].mismatch == ()
    assert cheap.cost.forwards == 0


LIMITS = {
    "none": ({}, [9]),
    "rows": ({"trainer.micro_batch_size": 2}, [2, 2, 2, 2, 1]),
    "decisions": ({"speed.micro_batch_decisions": 4}, [2, 1, 2, 1, 2, 1]),
    "both": ({"trainer.micro_batch_size": 4, "speed.micro_batch_decisions": 9}, [3, 3, 3]),
}


@pytest.mark.parametrize("case", LIMITS)
def test_an_evaluation_in_the_configured_parts_is_the_whole(policy, monkeypatch, case):
    """Completions of 1, 2 and 3 tokens."""
    from mmgrpo.config import load_config
    from mmgrpo.modalities.tokens import vllm_engine
    from mmgrpo.rollout import vllm_engine as module

    def answer(request):
        return [Completion([65 + i, 66, 67][: 1 + i], [-1.0] * (1 + i), True) for i in range(3)]

    seen, evaluate = [], policy.evaluate
    session = VllmSession(policy, Backend(completions=answer))
    monkeypatch.setitem(module._SESSIONS, policy, session)
    limits, sizes = LIMITS[case]
    config = load_config("quickstart/text", [f"{key}={value}" for key, value in limits.items()])
    engine = vllm_engine(policy, config, "train", {"max_new_tokens": 4})
    monkeypatch.setattr(
        policy, "evaluate", lambda part, *rest: seen.append(len(part)) or evaluate(part, *rest)
    )
    found = engine.generate(text_prompts(), group_size=3, seed=0).trajectories
    assert seen == sizes
    torch.testing.assert_close(found.old_log_prob, evaluate(found).log_prob)


# -- how it is started ----------------------------------------------------------------------------


def arguments(**changes):
    return engine_arguments(
        "folder", **{"dtype": "float32", "lora_rank": None, "options": {}, **changes}
    )


def test_the_user_s_options_join_what_is_fixed():
    found = arguments(lora_rank=9, options={"max_model_len": 100, "enforce_eager": True})
    assert found["max_lora_rank"] == 16
    assert found["logprobs_mode"] == "processed_logprobs"
    flags = server_flags(found, host="h", port=7)
    text = " ".join(flags)
    assert "--max-model-len 100" in text
    assert "--enforce-eager" in flags
    assert "--host h --port 7" in text
    assert "--no-enforce-eager" in server_flags({"enforce_eager": False}, host="h", port=7)


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (17, 32), (64, 64), (512, 512)])
def test_an_adapter_gets_the_least_room_that_holds_it(rank, room):
    assert arguments(lora_rank=rank)["max_lora_rank"] == room
    assert "max_lora_rank" not in arguments()


@pytest.mark.parametrize(
    ("gpu", "beside", "usual"),
    [
        (True, True, {"gpu_memory_utilization": 0.4, "enable_sleep_mode": True}),
        (True, False, {}),
        (False, True, {"enforce_eager": True, "enable_chunked_prefill": False}),
    ],
)
def test_the_user_s_options_go_before_the_usual_ones(monkeypatch, gpu, beside, usual):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert usual.items() <= arguments(beside_trainer=beside).items()
    for name in usual:
        assert arguments(beside_trainer=beside, options={name: "mine"})[name] == "mine"


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"options": {"dtype": "float16"}}, "options.dtype"), ({"lora_rank": 1000}, "rank 512")],
)
def test_what_cannot_be_is_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        arguments(**changes)


# -- a server's answers ---------------------------------------------------------------------------


@pytest.fixture
def server():
    """An HTTP server with a table of answers: path -> (status, JSON)."""
    answers = {"/collective_rpc": (200, {"results": [Stamp().as_dict()]})}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = answers.get(self.path, (404, {"detail": "Not Found"}))
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    http.answers, http.url = answers, f"http://127.0.0.1:{http.server_port}"
    yield http
    http.shutdown()
    http.server_close()


def test_a_server_that_is_not_there_or_not_ours_is_named(server):
    client = VllmClient(server.url)
    assert client.stamps() == [Stamp()]
    with pytest.raises(MmgrpoError, match=r"refuses /reset_mm_cache with status 404.*mmgrpo serve"):
        client.load({"a": torch.zeros(1)}, 0, "x")
    server.answers["/collective_rpc"] = (500, {"error": "broken"})
    with pytest.raises(MmgrpoError, match=r"status 500: .*broken"):
        client.stamps()
    with pytest.raises(MmgrpoError, match=r"does not answer .*mmgrpo serve CONFIG.*continues"):
        VllmClient("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="expected http"):
        VllmClient("localhost:8000")


def test_several_trainers_do_not_share_a_vllm(server, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 training processes"):
        LocalVllm("folder", dtype="float32")
    with pytest.raises(ConfigError, match="2 training processes"):
        VllmClient(server.url)


def test_old_weights_are_removed_from_the_shared_folder(server, tmp_path):
    for path in ("/reset_mm_cache", "/reset_encoder_cache"):
        server.answers[path] = (200, None)
    server.answers["/reset_prefix_cache"] = (200, {"success": True})
    client = VllmClient(server.url, folder=tmp_path)
    for version in (1, 2):
        client.load({"a": torch.zeros(1)}, version, f"{version}" * 64)
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(f"v{version}-")
    server.answers["/reset_prefix_cache"] = (200, {"success": False})
    with pytest.raises(MmgrpoError, match="somebody else"):
        client.load({"a": torch.zeros(1)}, 3, "3" * 64)


def test_vllm_in_the_trainer_s_process_has_one_worker():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 2.*mmgrpo serve"):
        LocalVllm("folder", dtype="float32", options={"tensor_parallel_size": 2})


def test_a_missing_vllm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"mmgrpo\[vllm\]"):
        LocalVllm("folder", dtype="float32")
