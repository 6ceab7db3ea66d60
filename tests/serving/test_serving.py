# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with one flag more: the same answers as without it, and drafts in the metrics."""

import math
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server import Server

import vllm_redrafter

FLAGS = (
    "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32",
    "--served-model-name", "target",
)  # fmt: skip


# In Triton's interpreter vLLM chooses Model Runner V2; the harness brings both together.
HARNESS = Path(__file__).resolve().parents[1] / "engine_v2" / "harness"
V2 = {
    "PYTHONPATH": os.pathsep.join(filter(None, (str(HARNESS), os.environ.get("PYTHONPATH")))),
    "TRITON_INTERPRET": "1",
}
V2_LOG = "Using V2 Model Runner"


def serve_both(tmp_path, target, drafter, flags, env=None):
    """A plain server and one with ReDrafter, started side by side."""
    plain = Server(tmp_path / "plain.log", target, *flags, env=env)
    ours = Server(
        tmp_path / "redrafter.log", target, *flags, env=env,
        speculative={"method": "redrafter", "model": str(drafter)},
    )  # fmt: skip
    try:
        plain.wait()
        ours.wait()
        yield plain, ours
    finally:
        plain.kill()
        ours.kill()


@pytest.fixture(scope="module", params=["v1", "v2"])
def servers(request, tmp_path_factory, target, drafter):
    flags, env = (*FLAGS, "--enforce-eager"), None
    if request.param == "v2":
        flags, env = (*flags, "--async-scheduling"), V2
    for both in serve_both(tmp_path_factory.mktemp("servers"), target, drafter, flags, env):
        for server in both:
            assert (V2_LOG in server.log.read_text()) == (request.param == "v2")
        yield both


def completion(prompt, **more):
    return {
        "model": "target", "prompt": prompt, "temperature": 0, "max_tokens": 48,
        "return_token_ids": True, **more,
    }  # fmt: skip


def prompts(count):
    rng = random.Random(3)
    return [[rng.randrange(256) for _ in range(rng.randint(2, 60))] for _ in range(count)]


def choice(server, body):
    return server.post("/v1/completions", body)["choices"][0]


def streamed_choice(server, body):
    tokens, text, finish, events = [], "", None, 0
    for event in server.stream("/v1/completions", body):
        (part,) = event["choices"]
        tokens += part["token_ids"] or []
        text += part["text"]
        finish = part["finish_reason"] or finish
        events += 1
    return {"token_ids": tokens, "text": text, "finish_reason": finish}, events


def compare(plain, ours, bodies):
    """Bodies answered one by one and all at once, streamed and not; returns ids of tokens."""
    expected = [choice(plain, body) for body in bodies]
    fields = ("token_ids", "text", "finish_reason")

    def check(answers):
        for answer, reference in zip(answers, expected, strict=True):
            assert {f: answer[f] for f in fields} == {f: reference[f] for f in fields}

    check([choice(ours, body) for body in bodies])
    with ThreadPoolExecutor(len(bodies)) as pool:
        check(pool.map(lambda body: choice(ours, body), bodies))
        streamed = list(pool.map(lambda body: streamed_choice(ours, body), bodies))
    check([answer for answer, _ in streamed])
    return [answer["token_ids"] for answer in expected], [events for _, events in streamed]


def drafted(server):
    metrics = server.metrics()
    return {
        name: metrics.get(f"vllm:spec_decode_num_{name}_total", 0.0)
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    }


def test_greedy_answers_are_equal(servers):
    plain, ours = servers
    before = drafted(ours)
    tokens, events = compare(plain, ours, [completion(prompt) for prompt in prompts(8)])
    assert len(set(map(tuple, tokens))) > 4
    assert max(map(len, tokens)) == 48
    after = drafted(ours)
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert after[name] > before[name]
    # Several tokens per step: fewer events than tokens, somewhere.
    assert sum(events) < sum(map(len, tokens))
    assert not any(drafted(plain).values())


def test_logprobs_are_equal(servers):
    plain, ours = servers
    for prompt in prompts(4):
        body = completion(prompt, logprobs=3)
        expected, answer = choice(plain, body), choice(ours, body)
        assert answer["token_ids"] == expected["token_ids"]
        ours_rows, plain_rows = answer["logprobs"], expected["logprobs"]
        assert ours_rows["tokens"] == plain_rows["tokens"]
        assert len(ours_rows["top_logprobs"]) == len(answer["token_ids"])
        for mine, theirs in zip(ours_rows["top_logprobs"], plain_rows["top_logprobs"], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(math.isclose(mine[t], theirs[t], abs_tol=1e-3) for t in mine)


def test_seeded_answers_are_equal(servers):
    plain, ours = servers
    for seed, prompt in enumerate(prompts(4)):
        body = completion(prompt, temperature=0.8, top_p=0.95, seed=seed)
        assert choice(ours, body)["token_ids"] == choice(plain, body)["token_ids"]


def test_several_choices_and_stop(servers):
    plain, ours = servers
    body = completion(prompts(1)[0], n=3, temperature=1.0, seed=11, stop=["e", "t"])
    expected = plain.post("/v1/completions", body)["choices"]
    answers = ours.post("/v1/completions", body)["choices"]
    assert len(answers) == 3
    key = ("index", "token_ids", "text", "finish_reason", "stop_reason")
    assert [[a[k] for k in key] for a in answers] == [[e[k] for k in key] for e in expected]


def test_a_client_that_leaves_does_no_harm(servers):
    plain, ours = servers
    for _ in range(3):
        stream = ours.stream("/v1/completions", completion([5, 6, 7], max_tokens=400))
        next(stream)
        stream.close()
    body = completion([8, 9, 10])
    assert choice(ours, body)["token_ids"] == choice(plain, body)["token_ids"]


def test_log_names_the_plugin_and_no_error(servers):
    _, ours = servers
    log = ours.log.read_text()
    assert "Traceback" not in log
    assert "vllm_redrafter" in log or "ReDrafter" in log


def test_sigterm_ends_every_process(servers):
    """Last: it stops the servers of this file."""
    plain, ours = servers
    codes = [server.stop() for server in (plain, ours)]
    assert ours.children, "the engine runs in processes of its own"
    assert codes[1] == codes[0]
    assert not ours.orphans()
    log = ours.log.read_text()
    # On a busy machine vLLM's front end may see the engine end before it has stopped listening to
    # it, and reports that once. A failure of the engine leaves a traceback of its own as well.
    assert log.count("Traceback") == log.count("EngineDeadError: EngineCore encountered an issue")
    assert not re.search('File ".*vllm_redrafter/', log)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("env", [None, V2], ids=["v1", "v2"])
def test_with_compilation_on(tmp_path, target, drafter, env):
    count = 8 if env is None else 3  # the interpreter takes its time
    for plain, ours in serve_both(tmp_path, target, drafter, FLAGS, env):
        compare(plain, ours, [completion(prompt) for prompt in prompts(count)])
        assert drafted(ours)["accepted_tokens"] > 0


def smollm2():
    """The real target: a directory from the environment, or what the demo downloads."""
    if given := os.environ.get("VLLM_REDRAFTER_TARGET"):
        return Path(given)
    from vllm_redrafter.demo.target import smollm2

    return smollm2()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_real_model(tmp_path):
    drafter = Path(vllm_redrafter.__file__).parent / "drafters" / "redrafter-smollm2-135m"
    flags = (*FLAGS, "--enforce-eager")
    questions = ["What is the capital of France?", "Write a poem about rain.", "What is a brick?"]
    for plain, ours in serve_both(tmp_path, smollm2(), drafter, flags):
        compare(plain, ours, [completion(question, max_tokens=64) for question in questions])
        chat = {
            "model": "target", "temperature": 0, "max_tokens": 64,
            "messages": [{"role": "user", "content": questions[0]}],
        }  # fmt: skip
        answers = [server.post("/v1/chat/completions", chat) for server in (plain, ours)]
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert texts[0] == texts[1] and "Paris" in texts[0]
        assert drafted(ours)["accepted_tokens"] > 0
