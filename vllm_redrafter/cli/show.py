# SPDX-License-Identifier: Apache-2.0
"""`vllm-redrafter show`: what was drafted and accepted for one prompt, step by step."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from vllm_redrafter.cli import UserError

# A measured budget may leave steps without nodes: nothing to look at.
FIXED = {"node_budget": "fixed", "num_speculative_tokens": 10}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("prompt", help="a question; the target's chat template is used where it has one")
    add("--target", help="target model; without it SmolLM2-135M-Instruct from PyPI")
    add("--drafter", metavar="DIR", help="its drafter; without it the one in this package")
    add("--raw", action="store_true", help="the prompt as it is, without a chat template")
    add("--max-tokens", type=int, default=48, metavar="N",
        help="longest answer (default %(default)s)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="show the first N steps only")
    add("--dtype", default="auto", help="as for vLLM (default %(default)s)")
    add("--speculative-config", default="{}", metavar="JSON",
        help='further keys, such as \'{"beam_width": 8}\'; without them trees have 10 nodes, '
        "because a node budget's choice depends on times")  # fmt: skip
    add("--svg", type=Path, metavar="FILE", help="write the same picture to FILE as SVG")
    add("--json", type=Path, metavar="FILE", help="write the steps to FILE as JSON")


def run(args: argparse.Namespace) -> int:
    """Answer, then show the steps; returns the exit code."""
    config = _config(args.speculative_config)
    if (args.target is None) != (args.drafter is None):
        raise UserError("--target and --drafter belong together: give both, or neither.")
    if args.max_tokens < 1 or (args.steps is not None and args.steps < 1):
        raise UserError("--max-tokens and --steps must be at least 1; give larger ones.")
    for name in ("svg", "json"):
        file = getattr(args, name)
        if file is not None and not file.absolute().parent.is_dir():
            parent = file.absolute().parent
            raise UserError(f"--{name} {file}: no such directory; make {parent} first.")
    steps, texts = _record(args, config)

    from rich.console import Console

    from vllm_redrafter.demo.steps_view import everything, svg

    content = everything(steps, lambda ids: texts[ids[0]], args.steps)
    Console(highlight=False).print(content)
    if args.svg is not None:
        args.svg.write_text(svg(content, "vllm-redrafter show"), encoding="utf-8")
        print(f"wrote {args.svg}")
    if args.json is not None:
        rows = [vars(step) for step in steps]
        out = {"prompt": args.prompt, "steps": rows, "texts": texts}
        args.json.write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    return 0


def _config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"--speculative-config {text!r} is not a JSON object; write one in braces.")
    return config


def _record(args: argparse.Namespace, config: dict[str, Any]) -> tuple[list[Any], dict[int, str]]:
    """The steps, and the text of every token in them."""
    # The engine runs in this process, so that its steps can be seen.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM, SamplingParams, TokensPrompt
    except ImportError as error:
        raise UserError("show needs vLLM: run `vllm-redrafter doctor`.") from error
    from vllm_redrafter.cli.demo import BUNDLED_DRAFTER
    from vllm_redrafter.demo.fetch import FetchError
    from vllm_redrafter.demo.target import smollm2
    from vllm_redrafter.drafter.config import DrafterError
    from vllm_redrafter.options import OptionError

    try:
        target, drafter = args.target or str(smollm2()), args.drafter or str(BUNDLED_DRAFTER)
        llm = LLM(
            model=target,
            dtype=args.dtype,
            enforce_eager=True,
            max_num_seqs=1,
            max_model_len=-1,  # what fits in the memory below
            kv_cache_memory_bytes=1 << 30,
            speculative_config={"method": "redrafter", "model": drafter, **FIXED, **config},
        )
    except (DrafterError, FetchError, OptionError, OSError, ValueError) as error:
        raise UserError(str(error)) from error
    from vllm_redrafter.engine.v1.recording import record_steps

    [steps, *others] = llm.collective_rpc(_recorder, args=(record_steps,))
    if steps is None or others:
        raise UserError(
            "show follows one engine on Model Runner V1, which is the CPU's; on a GPU look at "
            "`redrafter_accepted_tokens_by_depth_total` in /metrics."
        )
    tokenizer = llm.get_tokenizer()
    if tokenizer.chat_template and not args.raw:
        chat = [{"role": "user", "content": args.prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        ids = ids["input_ids"]
    else:
        ids = tokenizer(args.prompt)["input_ids"]
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    llm.generate(TokensPrompt(prompt_token_ids=ids), params, use_tqdm=False)
    tokens = {token for step in steps for token in (*step.tokens, *step.said)}
    return steps, {token: tokenizer.decode([token]) for token in sorted(tokens)}


def _recorder(worker: Any, record: Any) -> Any:
    """The growing list of steps; None where there is no runner of ours for trees of V1."""
    return record(worker) if hasattr(worker.model_runner, "_draft_trees") else None
