# SPDX-License-Identifier: Apache-2.0
"""``method: redrafter`` -> what an unmodified vLLM accepts.

``SpeculativeConfig.method`` is a closed list tested in many places of vLLM. So the method never
reaches it: ``EngineArgs.create_engine_config`` is wrapped, and public fields are rewritten: our
worker, the options in ``additional_config``, and a method that vLLM has. That is ``custom_class``
with our proposer for Model Runner V1, and for V2 ``draft_model`` with the drafter's directory (see
``vllm_redrafter.engine.v2.carrier``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_redrafter.drafter.config import MODEL_TYPES, DrafterError, load_config, model_type_of
from vllm_redrafter.options import METHOD, SCHEDULE, OptionError, check_keys, resolve_options

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
    """Wrap ``EngineArgs.create_engine_config`` once."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if getattr(original, _WRAPPED_MARK, False):
        return
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
        from vllm_redrafter.engine.checks import check_engine_args, check_engine_config

        options, drafter = read_options(asked)
        v2 = check_engine_args(self)
        rewrite(self, options, v2)
        config = original(self, *args, **kwargs)
        check_engine_config(config, options, drafter, v2)
        return config

    return create_engine_config


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
    if method != METHOD and (
        method is not None or not model or model_type_of(str(model)) not in MODEL_TYPES
    ):
        return None
    if given_twice:
        raise OptionError(f"{given_twice} say the same thing; give only one of them.")
    return config


def read_options(asked: dict[str, Any]) -> tuple[Any, Any]:
    """Options and drafter config of what the user asked for.

    Raises:
        OptionError, DrafterError: see there.
    """
    check_keys(asked)
    if not asked.get("model"):
        raise OptionError(
            "speculative_config with method 'redrafter' needs 'model', the drafter's directory."
        )
    directory = locate(str(asked["model"]))
    drafter = load_config(directory)
    options = resolve_options({**asked, "model": directory}, drafter)
    wanted = asked.get("num_speculative_tokens")
    if wanted is not None and wanted > options.num_speculative_tokens:
        logger.warning(
            "num_speculative_tokens is %d, but beam_width %d x draft_length %d gives at most %d "
            "nodes; using %d.",
            wanted, options.beam_width, options.draft_length, options.num_speculative_tokens,
            options.num_speculative_tokens,
        )  # fmt: skip
    return options, drafter


def locate(model: str) -> str:
    """A local drafter directory: ``model`` itself, or a download of the hub repository so named."""
    if Path(model).is_dir():
        return str(Path(model).resolve())
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        load_config(model)  # raises the message for a missing directory
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(model, allow_patterns=["*.json", "*.safetensors"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DrafterError(
            f"The drafter '{model}' is no local directory and could not be downloaded ({reason}); "
            "give the path of a directory that holds config.json and model.safetensors."
        ) from error


def rewrite(engine_args: Any, options: Any, v2: bool = False) -> None:
    """Put the options where vLLM carries them; touches public fields only.

    Args:
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

    compilation = engine_args.compilation_config
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
