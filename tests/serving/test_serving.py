# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with one flag more: the same answers as without it, and drafts in the metrics."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import counters
import parameters
import pytest
from server import Server, plain_and_redrafter
from tiny_models import write_json, write_llama

import vllm_redrafter
from vllm_redrafter.bench.serve_settings import lines
from vllm_redrafter.drafter.fingerprint import FIELD
from vllm_redrafter.training.fingerprint import of_directory

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


@pytest.fixture(scope="module", params=["v1", "v2"])
def servers(request, tmp_path_factory, target, drafter):
    (target / "generation_config.json").write_text(json.dumps(parameters.DEFAULTS))
    flags, env = (*FLAGS, "--enforce-eager", *parameters.flags(request.param)), {}
    if request.param == "v2":
        flags, env = (*flags, "--async-scheduling"), V2
    paths = str(parameters.TESTS), env.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
    env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with plain_and_redrafter(
        tmp_path_factory.mktemp("servers"), target, drafter, flags, env
    ) as both:
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


def runner_of(servers):
    return "v2" if V2_LOG in servers[1].log.read_text() else "v1"


def few(servers, count):
    """So many, or half of them in Triton's interpreter, where every token takes long."""
    return count if runner_of(servers) == "v1" else count // 2


def test_greedy_answers_are_equal(servers):
    plain, ours = servers
    before, asked, length = drafted(ours), few(servers, 8), few(servers, 48)
    bodies = [completion(prompt, max_tokens=length) for prompt in prompts(asked)]
    tokens, events = compare(plain, ours, bodies)
    assert len(set(map(tuple, tokens))) > asked // 2
    assert max(map(len, tokens)) == length
    after = drafted(ours)
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert after[name] > before[name]
    # Several tokens per step: fewer events than tokens, somewhere.
    assert sum(events) < sum(map(len, tokens))
    assert not any(drafted(plain).values())


def test_logprobs_are_equal(servers):
    plain, ours = servers
    for prompt in prompts(few(servers, 4)):
        body = completion(prompt, logprobs=3, max_tokens=few(servers, 48))
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
    for seed, prompt in enumerate(prompts(few(servers, 4))):
        body = completion(
            prompt, temperature=0.8, top_p=0.95, seed=seed, max_tokens=few(servers, 48)
        )
        assert choice(ours, body)["token_ids"] == choice(plain, body)["token_ids"]


def test_several_choices_and_stop(servers):
    plain, ours = servers
    body = completion(
        prompts(1)[0], n=3, temperature=1.0, seed=11, stop=["e", "t"], max_tokens=few(servers, 48)
    )
    expected = plain.post("/v1/completions", body)["choices"]
    answers = ours.post("/v1/completions", body)["choices"]
    assert len(answers) == 3
    key = ("index", "token_ids", "text", "finish_reason", "stop_reason")
    assert [[a[k] for k in key] for a in answers] == [[e[k] for k in key] for e in expected]


def ask_for_parameters(servers, asked):
    """No error where plain vLLM has none, and its answers, to all at once."""
    before = drafted(servers[1])
    with ThreadPoolExecutor(16) as pool:
        expected, answers = (
            list(pool.map(parameters.said, [server] * len(asked), [body for _, body in asked]))
            for server in servers
        )
    assert not [want for want in expected if isinstance(want, str)], "of plain vLLM"
    for (name, body), answer, want in zip(asked, answers, expected, strict=True):
        assert answer == want, (name, body)
    assert drafted(servers[1])["drafts"] > before["drafts"]



def test_special_sampling_parameters(servers):
    ask_for_parameters(servers, list(parameters.bodies(runner_of(servers), parameters.SPECIAL)))


@pytest.mark.slow
def test_every_sampling_parameter(servers):
    ask_for_parameters(servers, list(parameters.bodies(runner_of(servers))))


def test_a_client_that_leaves_does_no_harm(servers):
    plain, ours = servers
    for _ in range(3):
        stream = ours.stream("/v1/completions", completion([5, 6, 7], max_tokens=400))
        next(stream)
        stream.close()
    body = completion([8, 9, 10])
    assert choice(ours, body)["token_ids"] == choice(plain, body)["token_ids"]


def test_metrics_are_what_was_generated(servers):
    """Against the scheduler's own counts, after new requests of known kinds."""
    plain, ours = servers
    v1 = runner_of(servers) == "v1"
    before, began = counters.settled(ours), time.monotonic()
    tokens = [len(choice(ours, completion(prompt))["token_ids"]) for prompt in prompts(3)]
    asked = dict(parameters.bodies(runner_of(servers), ["structured_outputs"]))
    tokens.append(len(choice(ours, asked["structured_outputs"])["token_ids"]))
    after = counters.settled_since(ours, before) if v1 else counters.settled(ours)
    took = time.monotonic() - began
    new = {name: after[name] - before.get(name, 0.0) for name in after}
    assert new["vllm:generation_tokens_total"] == sum(tokens)
    # Every step says what was accepted in it and one token more.
    spare = 0 if v1 else 15 * len(tokens)
    assert 0 < new["redrafter_accepted_tokens_total"] < sum(tokens) - len(tokens) + spare
    assert 0 < new["redrafter_steps_total"] <= new["redrafter_drafts_total"]
    # On both: vLLM's worker for CPUs runs in another process than the scheduler with its grammars.
    reasons = counters.by_label(ours, "redrafter_fallbacks_total", "reason")
    assert any("structured output" in reason for reason in reasons)
    assert after["redrafter_drafting_off"] == 0
    assert "redrafter_draft_errors_total" not in after
    assert ("redrafter_part_seconds_total" in after) == v1
    if v1:
        assert 0 < new["redrafter_part_seconds_total"] < took
        assert 0 < new["redrafter_step_seconds_total"] < took
    counters.check_names(ours)
    counters.check_sums(ours, after, v1)
    (info,) = [sample for sample in ours.samples() if sample.name == "redrafter_config_info"]
    assert info.labels["model_name"] == "target" and info.labels["engine"] == "0"
    assert not [name for name in plain.metrics() if "redrafter" in name]


def test_log_says_once_what_runs(servers, target, drafter):
    plain, ours = servers
    log = ours.log.read_text()
    assert "Traceback" not in log
    (line,) = [line for line in log.splitlines() if "ReDrafter is on: " in line]
    assert " INFO " in line
    assert f"drafter '{drafter}' for target '{target}', which gets trees, W=" in line
    assert line.endswith(f", Model Runner {runner_of(servers).upper()}.")
    assert "redrafter" not in plain.log.read_text().lower().replace("vllm_redrafter", "")


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


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("env", [None, V2], ids=["v1", "v2"])
def test_with_compilation_on(tmp_path, target, drafter, env):
    count = 8 if env is None else 3  # the interpreter takes its time
    with plain_and_redrafter(tmp_path, target, drafter, FLAGS, env) as (plain, ours):
        compare(plain, ours, [completion(prompt) for prompt in prompts(count)])
        assert drafted(ours)["accepted_tokens"] > 0


def smollm2():
    """The real target: a directory from the environment, or what the demo downloads."""
    if given := os.environ.get("VLLM_REDRAFTER_TARGET"):
        return Path(given)
    from vllm_redrafter.demo.target import smollm2

    return smollm2()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_real_model(tmp_path):
    drafter = Path(vllm_redrafter.__file__).parent / "drafters" / "redrafter-smollm2-135m"
    flags = (*FLAGS, "--enforce-eager")
    questions = ["What is the capital of France?", "Write a poem about rain.", "What is a brick?"]
    with plain_and_redrafter(tmp_path, smollm2(), drafter, flags) as (plain, ours):
        compare(plain, ours, [completion(question, max_tokens=64) for question in questions])
        chat = {
            "model": "target", "temperature": 0, "max_tokens": 64,
            "messages": [{"role": "user", "content": questions[0]}],
        }  # fmt: skip
        answers = [server.post("/v1/chat/completions", chat) for server in (plain, ours)]
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert texts[0] == texts[1] and "Paris" in texts[0]
        assert drafted(ours)["accepted_tokens"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_drafter_in_the_targets_place(tmp_path, target, drafter):
    """`vllm serve DRAFTER_DIR`, and a fingerprint that is of another target: a warning."""
    place = shutil.copytree(drafter, tmp_path / "drafter")
    fingerprint = of_directory(write_llama(tmp_path / "other", seed=7)).to_json()
    config = json.loads((place / "config.json").read_text())
    write_json(place / "config.json", {**config, "target": str(target), FIELD: fingerprint})
    server = Server(tmp_path / "log", place, *FLAGS, "--enforce-eager", "--spec-tokens", "7")
    try:
        server.wait()
        server.post("/v1/completions", completion([3, 1, 4]))
        assert drafted(server)["accepted_tokens"] > 0
        log = server.log.read_text()
        assert f"Serving '{target}' with the drafter '{place}'" in log
        assert log.count("was not made for this target") == 1
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_script_for_small_machines(tmp_path, target, drafter):
    script = Path(__file__).resolve().parents[2] / "scripts" / "serve.sh"
    flags = (str(drafter), "--dtype", "float32", "--served-model-name", "target")
    # Not what an engine in this process has left there: vLLM sets it to GNU's runtime.
    env = {"VLLM_REDRAFTER_VENV": sys.prefix, "LD_PRELOAD": ""}
    server = Server(tmp_path / "log", target, *flags, env=env, program=(str(script),))
    try:
        server.wait()
        server.post("/v1/completions", completion([3, 1, 4]))
        assert drafted(server)["accepted_tokens"] > 0
        log = server.log.read_text()
        # vLLM warns of each that is missing.
        assert "libiomp is not found" not in log and "without Intel OpenMP" not in log
        assert server.resident_bytes() < 4 << 30
    finally:
        server.kill()


def test_a_target_without_its_drafter():
    script = Path(__file__).resolve().parents[2] / "scripts" / "serve.sh"
    env = {**os.environ, "VLLM_REDRAFTER_VENV": sys.prefix}
    done = subprocess.run([script, "target"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("after the target 'target' give the drafter's directory\n")


def test_settings_are_read_by_a_shell():
    """Directories with blanks and quotes arrive as they are."""
    settings = lines("a 'target'", 'my "drafter"')
    script = "\n".join([*settings, 'printf "%s|%s" "$TARGET" "$SPECULATIVE_CONFIG"'])
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout
    target, _, spec = said.partition("|")
    assert target == "a 'target'"
    assert json.loads(spec) == {"method": "redrafter", "model": 'my "drafter"'}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_metrics_of_several_front_ends(tmp_path, target, drafter):
    """Two API servers and two engines: any of the servers shows what all of them were told."""
    server = Server(
        tmp_path / "log", target, *FLAGS, "--enforce-eager", "--api-server-count", "2",
        "--data-parallel-size", "2",
        speculative={"method": "redrafter", "model": str(drafter)},
    )  # fmt: skip
    try:
        server.wait()
        with ThreadPoolExecutor(8) as pool:
            bodies = [completion(prompt) for prompt in prompts(16)]
            said = list(pool.map(lambda body: choice(server, body)["token_ids"], bodies))
        metrics = counters.settled_since(server, {})
        assert metrics["vllm:generation_tokens_total"] == sum(map(len, said))
        counters.check_sums(server, metrics, v1=True)
        counters.check_names(server)
        engines = counters.by_label(server, "redrafter_drafts_total", "engine")
        assert set(engines) == {"0", "1"}
        log = server.log.read_text()
        assert log.count("ReDrafter is on: ") == 2 and "Traceback" not in log
        # Both servers answered, or this shows nothing of a message to one of them.
        assert len(set(re.findall(r"\(ApiServer_(\d) ", log))) == 2
    finally:
        server.kill()
