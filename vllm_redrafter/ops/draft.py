# SPDX-License-Identifier: Apache-2.0
"""The whole beam draft as one compiled call.

``torch.ops.redrafter.draft`` does what ``vllm_redrafter.drafter.beam_search`` says, L steps for B
requests without returning to Python.

On the CPU it reads weights in a packed layout (``pack_linear``), so packing happens once, in
``CompiledDraft``. Arithmetic: products of float32 weights are float32. Inputs of bfloat16 weights
are rounded to bfloat16 and multiplied exactly; sums, activations between layers, logits,
log-probabilities and scores are float32 (the twin, in bfloat16, rounds each of them). Which tokens
are drafted may therefore differ from the twin's where candidates are closer than that rounding.

On CUDA it reads the weights as they are (``plain_layers``), and torch's matrix product multiplies
them, by its settings for float32. Activations and logits are rounded to the weights' dtype, as the
twin's are, but not each intermediate of a layer; log-probabilities and scores are float32. Nothing
is read back, so a call can be captured in a CUDA graph. What the CPU refuses by looking at values
has this outcome there: a token (of ``token``, or drafted through ``draft_vocab``) without a row in
the embedding is embedded as zeros. Limits: W and top_k up to 64, B times W up to 65535.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from vllm_redrafter.drafter.beam_search import Beams, beam_search, check_settings
from vllm_redrafter.drafter.model import Drafter
from vllm_redrafter.ops.library import compiled_available, has_kernel

PANEL = 32  # outputs of a layer that are stored side by side; csrc/cpu/draft_kernel.h

MAX_KEPT = 64  # beams, or a top k, that CUDA kernels keep; csrc/cuda/beam_step_kernel.cuh

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights of ``dtype`` are packed as: bfloat16 stays, anything else becomes float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def pack_linear(weight: Tensor) -> Tensor:
    """A linear layer's weight in the order in which the draft kernel reads it.

    Args:
        weight: ``[N, K]``, outputs by inputs, as ``torch.nn.Linear`` has it; any strides.

    Returns:
        ``[ceil(N / 32), ceil(K / g), 32, g]`` where g is 2 for bfloat16 and 1 for float32; entry
        ``[p, q, i, j]`` is ``weight[32 p + i, g q + j]``, zero outside the matrix. It takes the
        room of the weight (float16 is packed as float32, twice the room).
    """
    dtype = packed_dtype(weight.dtype)
    group = 2 if dtype == torch.bfloat16 else 1
    outputs, inputs = weight.shape
    panels, groups = -(-outputs // PANEL), -(-inputs // group)
    packed = _empty_in_large_pages((panels, groups, PANEL, group), dtype)
    whole_panels, whole_groups = outputs // PANEL, inputs // group
    packed[whole_panels:] = 0
    packed[:, whole_groups:] = 0
    by_output = packed.permute(0, 2, 1, 3)
    # Straight into place: a padded copy of a large head would double the peak of memory.
    body = weight[: whole_panels * PANEL, : whole_groups * group]
    by_output[:whole_panels, :, :whole_groups] = body.unflatten(0, (-1, PANEL)).unflatten(
        -1, (-1, group)
    )
    rest = outputs - whole_panels * PANEL
    if rest:
        by_output[whole_panels, :rest, :whole_groups] = weight[
            whole_panels * PANEL :, : whole_groups * group
        ].unflatten(-1, (-1, group))
    if inputs % group:
        column = by_output[:, :, whole_groups, 0]
        column[:whole_panels] = weight[: whole_panels * PANEL, -1].unflatten(0, (-1, PANEL))
        if rest:
            column[whole_panels, :rest] = weight[whole_panels * PANEL :, -1]
    return packed


class CompiledDraft:
    """``beam_search`` of one drafter, compiled.

    Memory on the CPU: the packed layers take as much room as the drafter's own.
    ``take_weights=True`` frees each of those as soon as it is packed (the drafter object is then of
    no further use), so that the weights are held once and never more than one layer twice. On CUDA
    the drafter's own weights are referred to, and ``take_weights`` changes nothing.

    Where the library has no kernels for the drafter's device, or settings or dtypes are beyond
    them, calls go to the twin and nothing is packed or freed.

    Args:
        drafter: on one device. Its ``embedding`` need not be bound.
        embedding: the target's input embedding table, ``[>= vocab_size, H]``, float32, bfloat16 or
            float16; rows may be apart by any stride. It is referred to, not copied. None: the
            drafter's.
        beam_width: W >= 1.
        draft_length: L >= 1 drafted tokens, never counting the known token.
        top_k: renormalise each row over its k largest logits first; 0 is off, None is the drafter's
            own default (as in ``beam_search``).
        take_weights: see above.

    Raises:
        ValueError: an argument is out of range, or the embedding does not fit the drafter.
    """

    def __init__(
        self,
        drafter: Drafter,
        embedding: Tensor | None = None,
        *,
        beam_width: int,
        draft_length: int,
        top_k: int | None = None,
        take_weights: bool = False,
    ) -> None:
        if top_k is None:
            top_k = drafter.config.defaults.get("top_k", 0)
        check_settings(beam_width, draft_length, top_k)
        config = drafter.config
        embedding = drafter.embedding if embedding is None else embedding
        if embedding is None:
            raise ValueError("There is no embedding; pass the target's input embedding table.")
        if embedding.dim() != 2 or embedding.shape[1] != config.hidden_size:
            raise ValueError(
                f"The embedding is {list(embedding.shape)}, but the drafter's hidden_size is "
                f"{config.hidden_size}: pass the table of the target it was trained for."
            )
        if embedding.shape[0] < config.vocab_size:
            raise ValueError(
                f"The embedding has {embedding.shape[0]} rows, but the drafter's vocab_size is "
                f"{config.vocab_size}: pass the table of the target it was trained for."
            )
        self.config = config
        self.embedding = embedding.detach()
        self.beam_width = beam_width
        self.draft_length = draft_length
        self.top_k = top_k
        self.draft_vocab = None if drafter.draft_vocab is None else drafter.draft_vocab.contiguous()
        self._layers: list[Tensor] = []
        self._twin: Drafter | None = None
        if not (compiled_available() and self._has_kernel(drafter)):
            self._twin = drafter
        elif self.embedding.is_cpu:
            self._layers = _pack(drafter, take_weights)
        else:
            self._layers = plain_layers(drafter)

    def _has_kernel(self, drafter: Drafter) -> bool:
        device = self.embedding.device
        if not has_kernel(device) or self.embedding.dtype not in _DTYPES:
            return False
        if any(tensor.device != device for tensor in drafter.parameters()):
            return False
        if device.type == "cpu":
            return True
        kept = max(self.beam_width, min(self.top_k, self.config.draft_vocab_size))
        same_dtype = all(tensor.dtype == drafter.dtype for tensor in drafter.parameters())
        return kept <= MAX_KEPT and same_dtype and drafter.dtype in _DTYPES

    @property
    def compiled(self) -> bool:
        """Whether calls run the compiled operator, not the twin."""
        return self._twin is None

    def packed_bytes(self) -> int:
        """What the layers take in memory: packed ones, or on CUDA the drafter's own."""
        return sum(tensor.nbytes for tensor in self._layers)

    def __call__(
        self,
        context: Tensor,
        token: Tensor,
        beam_width: int | None = None,
        draft_length: int | None = None,
    ) -> Beams:
        """Draft for every request of a batch; see ``beam_search`` for the meaning.

        Args:
            context: ``[B, H]``, float32, bfloat16 or float16.
            token: ``[B]`` int64.
            beam_width, draft_length: others than those of the constructor, from the same packed
                weights.

        Raises:
            RuntimeError: shapes or dtypes do not fit, or (CPU) a token has no embedding.
        """
        width, length = beam_width or self.beam_width, draft_length or self.draft_length
        if self._twin is not None:
            return self._call_twin(context, token, width, length)
        shape = (token.shape[0], length, width)
        device = self.embedding.device
        tokens = torch.empty(shape, dtype=torch.int64, device=device)
        parents = torch.empty(shape, dtype=torch.int64, device=device)
        scores = torch.empty(shape, dtype=torch.float32, device=device)
        torch.ops.redrafter.draft(
            tokens,
            parents,
            scores,
            context if context.stride(-1) == 1 else context.contiguous(),
            token,
            self.embedding,
            self.draft_vocab,
            self._layers,
            self.config.draft_vocab_size,
            self.config.exit_dim,
            self.config.num_draft_layers,
            bool(self.config.rnn),
            self.top_k,
        )
        return Beams(root=token, tokens=tokens, parents=parents, scores=scores)

    def _call_twin(self, context: Tensor, token: Tensor, width: int, length: int) -> Beams:
        bound = self._twin.embedding
        self._twin.embedding = self.embedding
        try:
            return beam_search(self._twin, context, token, width, length, self.top_k)
        finally:
            self._twin.embedding = bound


def _linears(drafter: Drafter) -> Iterator[tuple[torch.nn.Linear, tuple[slice, ...]]]:
    """The drafter's layers in the operator's order, and the column ranges each is handed over in.

    With a recurrent cell: ``rnn_w``, ``rnn_u`` (which has its bias). Then the layer that reads
    [context; state], that is ``input_proj`` or without one the first block, in two halves, context
    first (nothing if there is neither). Then the other blocks. Last, the head.
    """
    config = drafter.config
    whole = (slice(None),)
    if config.rnn:
        yield drafter.rnn_w, whole
        yield drafter.rnn_u, whole
    halves = (slice(None, config.hidden_size), slice(config.hidden_size, None))
    *blocks, head = drafter.lm_head
    if config.has_input_proj:
        yield drafter.input_proj, halves
    elif blocks:
        yield blocks.pop(0).linear, halves
    for block in blocks:
        yield block.linear, whole
    yield head, whole


def _pack(drafter: Drafter, take_weights: bool) -> list[Tensor]:
    """The operator's ``layers`` on the CPU: ``_linears``, packed weights before float32 biases."""
    layers: list[Tensor] = []
    with torch.inference_mode():
        for linear, parts in _linears(drafter):
            layers.extend(pack_linear(linear.weight[:, part]) for part in parts)
            if linear.bias is not None:
                layers.append(linear.bias.detach().to(torch.float32, copy=True))
            if take_weights:
                linear.weight.data = linear.weight.new_empty(0)
    return layers


def plain_layers(drafter: Drafter) -> list[Tensor]:
    """The operator's ``layers`` on CUDA: as on the CPU, but weights are views, ``[out, in]``."""
    layers: list[Tensor] = []
    for linear, parts in _linears(drafter):
        layers.extend(linear.weight.detach()[:, part] for part in parts)
        if linear.bias is not None:
            layers.append(linear.bias.detach().to(torch.float32))
    return layers


def _empty_in_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, in 2 MiB pages where it is large and the system offers them.

    Streaming a large head through 4 KiB pages costs a page walk every few cache lines.
    """
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if size < 1 << 21 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without transparent huge pages
        pass
    return torch.frombuffer(memory, dtype=dtype).view(shape)


if compiled_available():

    @torch.library.register_fake("redrafter::draft")
    def _draft_fake(
        tokens: Tensor,
        parents: Tensor,
        scores: Tensor,
        context: Tensor,
        token: Tensor,
        embedding: Tensor,
        draft_vocab: Tensor | None,
        layers: list[Tensor],
        head_rows: int,
        exit_dim: int,
        num_blocks: int,
        rnn: bool,
        top_k: int,
    ) -> None:
        return None
