# SPDX-License-Identifier: Apache-2.0
"""``method: redrafter`` -> what an unmodified vLLM accepts.

``SpeculativeConfig.method`` is a closed list tested in many places of vLLM. So the method never
reaches it: ``EngineArgs.create_engine_config`` is wrapped, and public fields are rewritten: our
worker, the options in ``additional_config``, and a method that vLLM has. That is ``custom_class``
with our proposer for Model Runner V1, and for V2 ``draft_model`` with the drafter's directory (see
``vllm_redrafter.engine.v2.carrier``).
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_redrafter.drafter.config import DrafterError, load_config
from vllm_redrafter.engine import cli_flags
from vllm_redrafter.engine.served_drafter import asked_by_model, is_drafter, serve_named_target
from vllm_redrafter.options import (
    REVISION,
    SCHEDULE,
    OptionError,
    check_keys,
    for_chains,
    is_method,
    resolve_options,
)

logger = logging.getLogger("vllm.vllm_redrafter")

# Our key in vLLM's additional_config.
OPTIONS_KEY = "redrafter"

PROPOSER_PATH = "vllm_redrafter.engine.v1.proposer.ReDrafterProposer"
CPU_WORKER_PATH = "vllm_redrafter.engine.v1.worker.ReDrafterCPUWorker"

V2_CARRIER = "vllm_redrafter.engine.v2.carrier:register_carrier"
V2_CPU_WORKER_PATH = "vllm_redrafter.engine.v2.cpu_worker.ReDrafterCPUWorker"
V2_CUDA_WORKER_PATH = "vllm_redrafter.engine.v2.cuda_worker.ReDrafterGPUWorker"

_WRAPPED_MARK = "_vllm_redrafter_wrapped"


def install() -> None:
    """Wrap ``EngineArgs.create_engine_config`` once, whoever else has; and the command line."""
    from vllm.engine.arg_utils import EngineArgs

    cli_flags.install()
    original = wrapper = EngineArgs.create_engine_config
    while wrapper is not None:
        if getattr(wrapper, _WRAPPED_MARK, False):
            return
        # Set by functools.wraps. Behind a wrapper without it we are not seen, and wrap again: the
        # outer one then leaves nothing to do for the inner.
        wrapper = getattr(wrapper, "__wrapped__", None)
    wrapped = _wrap(original)
    setattr(wrapped, _WRAPPED_MARK, True)
    EngineArgs.create_engine_config = wrapped  # type: ignore[method-assign]


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = asked_for_redrafter(self)
        if asked is None:
            return original(self, *args, **kwargs)
        # Imported only when asked for: it pulls in torch and the drafter.
        from vllm_redrafter.engine.checks import check_engine_args, check_engine_config, wants_v2
        from vllm_redrafter.engine.inherited_checks import leave_out
        from vllm_redrafter.engine.node_schedule import with_schedule
        from vllm_redrafter.engine.prometheus.receiver import METRICS_KEY, listen
        from vllm_redrafter.engine.target_shape import Shape, check_target, put_shape

        v2 = wants_v2()
        # With LoRA vLLM wants room for all nodes of all requests in a step, as V2 does.
        options, drafter = read_options(asked, fixed_rows=v2 or bool(self.enable_lora))
        # The user's object still says what the user said: after a refusal it serves plain vLLM.
        ours = copy.copy(self)
        if is_drafter(self.model):
            serve_named_target(ours, self.model)
        check_engine_args(ours)
        if v2:
            options = with_schedule(ours, options, drafter)
        # Every process that takes requests makes its configuration here first.
        leave_out()

        def configured(options: Any) -> tuple[Any, Mapping[str, Any], Any]:
            """vLLM's configuration; our fields before vLLM's own changes; and after them."""
            mine = copy.copy(ours)
            rewrite(mine, options, v2)
            # An encoder-cache connector's statistics travel where ours would.
            if mine.ec_transfer_config is None and listen():
                mine.additional_config[METRICS_KEY] = True
            rewritten = dict(vars(mine))
            return original(mine, *args, **kwargs), rewritten, mine

        config, rewritten, mine = configured(options)
        shape = check_target(config.model_config, config.device_config.device_type == "cpu")
        if shape.shape is Shape.CHAIN:
            chosen = asked.get("num_speculative_tokens") is not None
            fewer = for_chains(options, chosen, shape.keeps_states)
            if fewer != options:
                # Only the finished configuration says what kind of target it is.
                options = fewer
                config, rewritten, mine = configured(options)
        put_shape(config, shape)
        check_engine_config(config, options, drafter, v2)
        _keep_what_vllm_set(self, rewritten, mine)
        return config

    return create_engine_config


def _keep_what_vllm_set(engine_args: Any, before: Mapping[str, Any], after: Any) -> None:
    """What vLLM itself sets in an ``EngineArgs``, as sizes that were left to it, callers may read.

    Args:
        before: fields of ``after``, a rewritten copy of ``engine_args``, before vLLM ran.
    """
    missing = object()
    for name, value in vars(after).items():
        old = before.get(name, missing)
        # What we rewrote is no longer the user's, and stays in the copy.
        if value is not old and getattr(engine_args, name, missing) is old:
            setattr(engine_args, name, value)


def asked_for_redrafter(engine_args: Any) -> dict[str, Any] | None:
    """The user's speculative_config, if it asks for ReDrafter by method or by directory."""
    given = engine_args.speculative_config or {}
    if not isinstance(given, Mapping):
        return None
    config = {str(key).replace("-", "_"): value for key, value in given.items()}
    given_twice = None
    for field, key in (
        ("spec_method", "method"),
        ("spec_model", "model"),
        ("spec_tokens", "num_speculative_tokens"),
    ):
        value = getattr(engine_args, field, None)
        if value is not None:
            if key in config:
                given_twice = f"{field} and speculative_config's {key!r}"
            config.setdefault(key, value)
    method, model = config.get("method"), config.get("model")
    if (by_model := asked_by_model(engine_args.model, config)) is not None:
        config = by_model
    elif not is_method(method) and (method is not None or not is_drafter(model)):
        return None
    if given_twice:
        raise OptionError(f"{given_twice} say the same thing; give only one of them.")
    return config


def read_options(asked: dict[str, Any], *, fixed_rows: bool = False) -> tuple[Any, Any]:
    """Options and drafter config of what the user asked for.

    Args:
        fixed_rows: see ``resolve_options``.

    Raises:
        OptionError, DrafterError: see there.
    """
    check_keys(asked)
    if not asked.get("model"):
        raise OptionError(
            "speculative_config with method 'redrafter' needs 'model', the drafter's directory."
        )
    directory = locate(str(asked["model"]), asked.get(REVISION))
    drafter = load_config(directory)
    options = resolve_options({**asked, "model": directory}, drafter, fixed_rows=fixed_rows)
    wanted = asked.get("num_speculative_tokens")
    if wanted is not None and wanted > options.num_speculative_tokens:
        logger.warning(
            "num_speculative_tokens is %d, but beam_width %d x draft_length %d and the lookup give "
            "at most %d nodes; using that many.",
            wanted, options.beam_width, options.draft_length, options.num_speculative_tokens,
        )  # fmt: skip
    return options, drafter


def locate(model: str, revision: str | None = None) -> str:
    """A local drafter directory: ``model`` itself, or a download of the hub repository so named.

    Args:
        revision: branch, tag or commit on the hub; of no matter for a directory.
    """
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise OptionError(
            f"revision is {revision!r} in speculative_config; it must be a branch, a tag or a "
            "commit of the drafter's repository on the hub."
        )
    if Path(model).is_dir():
        return str(Path(model).resolve())
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        load_config(model)  # raises the message for a missing directory
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(
            model, revision=revision, allow_patterns=["*.json", "*.safetensors"]
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision '{revision}'" if revision else ""
        raise DrafterError(
            f"The drafter '{model}'{at} is no local directory and could not be downloaded "
            f"({reason}); give the path of a directory that holds config.json and "
            "model.safetensors."
        ) from error


def rewrite(engine_args: Any, options: Any, v2: bool = False) -> None:
    """Put the options where vLLM carries them; touches public fields only.

    Args:
        engine_args: is changed; what it holds, such as a dictionary of the user's, is not.
        v2: for Model Runner V2.
    """
    engine_args.speculative_config = {
        "method": "custom_class",
        "model": PROPOSER_PATH,
        "num_speculative_tokens": options.num_speculative_tokens,
    }
    engine_args.worker_cls = CPU_WORKER_PATH
    if v2:
        _rewrite_for_v2(engine_args, options)
    engine_args.spec_method = engine_args.spec_model = engine_args.spec_tokens = None
    additional = dict(engine_args.additional_config or {})
    additional[OPTIONS_KEY] = options.to_dict()
    engine_args.additional_config = additional


def _rewrite_for_v2(engine_args: Any, options: Any) -> None:
    from vllm.platforms import current_platform

    from vllm_redrafter.engine.compat import resolve

    # By name: what both engines share imports neither.
    resolve(V2_CARRIER)()  # type: ignore[operator]
    engine_args.speculative_config = {
        "method": "draft_model",
        "model": options.model,
        "num_speculative_tokens": options.num_speculative_tokens,
        # The other choice would keep logits of every draft.
        "draft_sample_method": "greedy",
        # Every rank of a tensor-parallel target has the whole drafter.
        "draft_tensor_parallel_size": 1,
    }
    if options.num_speculative_tokens_per_batch_size:
        engine_args.speculative_config[SCHEDULE] = [
            (first, last, min(nodes, options.num_speculative_tokens))
            for first, last, nodes in options.num_speculative_tokens_per_batch_size
        ]
    if current_platform.is_cpu():
        engine_args.worker_cls = V2_CPU_WORKER_PATH
        return
    engine_args.worker_cls = V2_CUDA_WORKER_PATH
    _choose_graphs(engine_args, options)


def _choose_graphs(engine_args: Any, options: Any) -> None:
    """CUDA graphs that the user left to us; what the user chose stays."""
    import torch
    from vllm.config import CUDAGraphMode

    from vllm_redrafter.engine.capture_sizes import capture_sizes
    from vllm_redrafter.ops.library import has_kernel

    # Not the user's object, of which this is a part.
    compilation = engine_args.compilation_config = copy.deepcopy(engine_args.compilation_config)
    if compilation.cudagraph_mode is None and not has_kernel(torch.device("cuda")):
        # The PyTorch twins read the device, which no capture allows. Between piecewise graphs
        # attention runs eagerly.
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    if engine_args.enforce_eager or compilation.cudagraph_mode == CUDAGraphMode.NONE:
        return
    for chosen in (engine_args, compilation):
        if chosen.cudagraph_capture_sizes or chosen.max_cudagraph_capture_size is not None:
            return
    engine_args.cudagraph_capture_sizes = capture_sizes(
        options, engine_args.max_num_seqs, engine_args.max_num_batched_tokens
    )


def options_of(vllm_config: Any) -> Any:
    """The ReDrafterOptions that a rewritten config carries."""
    from vllm_redrafter.options import ReDrafterOptions

    return ReDrafterOptions(**vllm_config.additional_config[OPTIONS_KEY])
