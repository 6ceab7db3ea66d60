# SPDX-License-Identifier: Apache-2.0
"""Every form in which vLLM's command line takes the flag, up to the finished configuration."""

import json
import shutil

import pytest
import tiny_models

from vllm_redrafter.drafter.checkpoint import save_drafter
from vllm_redrafter.options import OptionError
from vllm_redrafter.plugin import register


@pytest.fixture(scope="module")
def parser():
    """`vllm`, with its subcommand `serve` alone."""
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    parser = FlexibleArgumentParser()
    commands = parser.add_subparsers(dest="subparser")
    (command,) = cmd_init()
    command.subparser_init(commands)
    return parser


@pytest.fixture
def serve(parser):
    """What `vllm serve ARGV` would start."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    def serve(*argv):
        args = parser.parse_args(["serve", *map(str, argv)])
        if args.model_tag is not None:
            args.model = args.model_tag  # as `serve` itself does
        return AsyncEngineArgs.from_cli_args(args).create_engine_config()

    return serve


def as_json(drafter, **more):
    return json.dumps({"method": "redrafter", "model": str(drafter), **more})


FORMS = {
    "--speculative-config": lambda d: ["--speculative-config", as_json(d)],
    "=": lambda d: [f"--speculative-config={as_json(d)}"],
    "underscore": lambda d: ["--speculative_config", as_json(d)],
    "-sc": lambda d: ["-sc", as_json(d)],
    "without method": lambda d: ["-sc", json.dumps({"model": str(d)})],
    "ReDrafter": lambda d: ["-sc", json.dumps({"method": "ReDrafter", "model": str(d)})],
    "REDRAFTER": lambda d: ["-sc", json.dumps({"method": "REDRAFTER", "model": str(d)})],
    "hyphens": lambda d: ["-sc", as_json(d, **{"num-speculative-tokens": 5})],
    "dots": lambda d: ["--speculative-config.method", "redrafter",
                       "--speculative-config.model", d],
    "dots, one key": lambda d: ["--speculative-config.model", d],
    "-sc.": lambda d: ["-sc.method", "Redrafter", "-sc.model", d],
    "--spec-method": lambda d: ["--spec-method", "redrafter", "--spec-model", d],
    "--spec_method": lambda d: ["--spec_method=redrafter", "--spec_model", d],
    "--spec-method ReDrafter": lambda d: ["--spec-method", "ReDrafter", "--spec-model", d],
    "--spec-model": lambda d: ["--spec-model", d],
    "--spec-tokens": lambda d: ["--spec-model", d, "--spec-tokens", "5"],
    "both": lambda d: ["--spec-method", "redrafter",
                       "-sc", json.dumps({"model": str(d), "beam_width": 2})],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_works(serve, target, drafter, form):
    config = serve(target, *FORMS[form](drafter))
    assert config.additional_config["redrafter"]["model"] == str(drafter)
    assert config.parallel_config.worker_cls.startswith("vllm_redrafter.")
    if "tokens" in form or form == "hyphens":
        assert config.speculative_config.num_speculative_tokens == 5


@pytest.mark.parametrize("nested", [True, False])
def test_a_configuration_file(serve, target, drafter, tmp_path, nested):
    path = tmp_path / "serve.yaml"
    if nested:
        text = f"speculative-config:\n  method: redrafter\n  model: {drafter}\n"
    else:
        text = f"spec-method: redrafter\nspec-model: {drafter}\n"
    path.write_text(f"model: {target}\n{text}", encoding="utf-8")
    config = serve("--config", path)
    assert config.additional_config["redrafter"]["model"] == str(drafter)


def test_other_methods_parse_as_before(parser, serve, target, capsys):
    for method in ("ngram", "eagle3"):
        assert parser.parse_args(["serve", "m", "--spec-method", method]).spec_method == method
    config = serve(target, "-sc", json.dumps(
        {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    ))  # fmt: skip
    assert config.speculative_config.method == "ngram"
    assert serve(target).speculative_config is None
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "m", "--spec-method", "redrafted"])
    text = capsys.readouterr().err
    assert "invalid choice: 'redrafted'" in text and "redrafter" in text


def test_the_command_line_is_wrapped_once(parser):
    from vllm.engine.arg_utils import EngineArgs

    once = EngineArgs.add_cli_args
    register()
    assert EngineArgs.add_cli_args is once
    assert not hasattr(once.__wrapped__, "__wrapped__")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--spec-method", "redrafter"], "needs 'model', the drafter's directory"),
        (["-sc", '{"method": "ReDrafter"}'], "needs 'model', the drafter's directory"),
        (["-sc.method", "redrafter"], "needs 'model', the drafter's directory"),
    ],
)
def test_no_drafter(serve, target, argv, message):
    with pytest.raises(OptionError, match=message):
        serve(target, *argv)


# -- `vllm serve DRAFTER_DIR` --------------------------------------------------------------------


@pytest.fixture
def pair(target, tmp_path):
    """A target and a drafter side by side; the drafter's config.json is to be written."""
    shutil.copytree(target, tmp_path / "some-target")
    return tmp_path


def drafter_of(pair, **fields):
    save_drafter(tiny_models.random_drafter(), pair / "some-drafter", **fields)
    return pair / "some-drafter"


@pytest.mark.parametrize("how", ["beside it", "absolute", "from here"])
def test_a_drafter_serves_its_target(serve, pair, how, monkeypatch):
    name = {"beside it": "some-target", "absolute": str(pair / "some-target"),
            "from here": "here/some-target"}[how]  # fmt: skip
    if how == "from here":
        (pair / "here").mkdir()
        (pair / "some-target").rename(pair / "here" / "some-target")
        monkeypatch.chdir(pair)
    drafter = drafter_of(pair, target=name)
    config = serve(drafter, "--max-num-seqs", "7")
    assert config.model_config.model.endswith("some-target")
    assert config.model_config.tokenizer == config.model_config.model
    assert config.additional_config["redrafter"]["model"] == str(drafter)
    assert config.scheduler_config.max_num_seqs == 7


def test_a_drafter_with_options(serve, pair):
    drafter = drafter_of(pair, target="some-target")
    for argv in (
        ["-sc", json.dumps({"beam_width": 2})],
        ["-sc", as_json(drafter, beam_width=2)],
        ["--spec-method", "redrafter", "-sc.beam_width", "2"],
    ):
        config = serve(drafter, *argv)
        assert config.additional_config["redrafter"]["beam_width"] == 2
        assert config.model_config.model == str(pair / "some-target")


def test_a_target_on_the_hub(pair, monkeypatch):
    """Only its name is looked at here."""
    from vllm_redrafter.engine.served_drafter import named_target

    assert named_target(str(drafter_of(pair, target="owner/name"))) == "owner/name"


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({}, "its config.json does not name its target"),
        ({"target": 3}, "its config.json does not name its target"),
        ({"target": "nowhere"}, "its target 'nowhere' was not found here or beside it"),
        ({"target": "/no/where"}, "its target '/no/where' was not found here or beside it"),
        ({"target": "some-drafter"}, "its target 'some-drafter' was not found here or beside it"),
    ],
)
def test_a_drafter_whose_target_is_not_there(serve, pair, fields, problem):
    drafter = drafter_of(pair, **fields)
    with pytest.raises(OptionError) as raised:
        serve(drafter)
    text = str(raised.value)
    assert text.startswith(f"'{drafter}' is a drafter, not a target, and {problem}: run `vllm")
    assert f'vllm serve TARGET --speculative-config \'{{"model": "{drafter}"}}\'`' in text


def test_apples_drafters_too(serve, pair):
    drafter = drafter_of(pair)
    config = json.loads((drafter / "config.json").read_text())
    apples = {"model_type": "recurrent_drafting_drafter"} | {
        name: config[name]
        for name in ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn")
    }
    tiny_models.write_json(drafter / "config.json", apples)
    with pytest.raises(OptionError, match="is a drafter, not a target"):
        serve(drafter)


@pytest.mark.parametrize("given", [{"method": "ngram", "prompt_lookup_max": 2}, {"model": "other"}])
def test_a_drafter_and_another_way_to_speculate(serve, pair, given):
    drafter = drafter_of(pair, target="some-target")
    with pytest.raises(OptionError, match="is a drafter, not a target, and speculative_config"):
        serve(drafter, "-sc", json.dumps({"num_speculative_tokens": 2, **given}))
