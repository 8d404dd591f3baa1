"""Rotate the residual stream and drop its last dimensions (SliceGPT, arXiv:2401.15024).

Whatever reads the stream is multiplied by a matrix with orthonormal columns, and whatever writes to
it by the transpose. A norm's weight does not commute with that, so it moves into what reads behind
the norm; a head that shares the embeddings' weights gets its own.

With one matrix for the whole stream the result is an ordinary model of a smaller hidden size. Its
norms take the mean over k dimensions instead of d: weights of sqrt(d / k), and an epsilon d / k
times as large, make them divide by what the norms of the original width would.

Shapes: D hidden size, K dimensions that are left, R rows and C columns of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LoadingError, NonFiniteError, UnsupportedModel
from .anatomy import Anatomy, find_anatomy
from .configuring import describe_model
from .geometry import adopt_geometry, match_widths
from .sliced import names_of, slice_layer, slice_trunk


@dataclass(frozen=True)
class Rotate:
    """Express the residual stream in other bases, of fewer dimensions."""

    width: int
    """K"""
    shared: bool
    """One basis for the whole stream, instead of one for each stretch, with shortcut matrices."""
    bases: Sequence[Tensor] = ()
    """Orthonormal columns, (D, K): shared, one; else of the embeddings, then behind the attention
    and behind the MLP of each layer, the last of them (D, D)."""
    kind: ClassVar[str] = "rotate"

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        anatomy = find_anatomy(model)
        check_rotatable(anatomy)
        self._check(anatomy)
        if self.shared:
            _apply_shared(model, anatomy, self.bases[0])
        else:
            _apply_with_shortcuts(model, anatomy, self.bases)

    def follow(self, model: nn.Module, moments: dict) -> bool:
        moments.clear()  # second moments of single weights mean nothing in another basis
        return False

    def record(self) -> dict[str, Any]:
        return {"edit": self.kind, "hidden_size": self.width, "shared": self.shared}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Rotate:
        return cls(int(record["hidden_size"]), bool(record["shared"]))

    def _check(self, anatomy: Anatomy) -> None:
        if not self.bases:
            raise LoadingError(
                "A rotation cannot be made again from its record, which does not hold the matrices;"
                " load the checkpoint that was written beside it."
            )
        for basis in self.bases:
            product = basis.double().T @ basis.double()
            error = (product - torch.eye(len(product), dtype=product.dtype)).abs().max()
            if not error < 1e-5:
                raise NonFiniteError(
                    f"The basis of a rotation is off orthonormality by {float(error):.2g}. Load "
                    "the model with --dtype float32, and check that it is sound."
                )


def check_rotatable(anatomy: Anatomy) -> None:
    """Raise UnsupportedModel, saying why, unless the residual stream of a model can be rotated."""
    architecture = anatomy.architecture
    model: Any = anatomy.model
    why = ""
    norms = (architecture.attention_norms, architecture.mlp_norms)
    if architecture.scales_embedding:
        why = "its embeddings are scaled by the hidden size"
    elif architecture.other_hidden:
        why = "its convolutions work on single hidden dimensions"
    elif any(after for _, after in norms):
        why = "norms follow its attention and MLP, and a rotation does not pass through them"
    elif not all(before for before, _ in norms):
        why = "its attention and MLP do not each read the stream through a norm of their own"
    elif is_sliced(anatomy):
        why = "it is sliced already"
    elif not all(hasattr(norm, "variance_epsilon") for norm in stream_norms(anatomy)):
        why = (
            "its norms are not RMS norms with a weight, or are missing where a sublayer is skipped"
        )
    if why:
        raise UnsupportedModel(
            f"The residual stream of a model of type '{model.config.model_type}' cannot be "
            f"rotated: {why}. Take another method."
        )


def is_sliced(anatomy: Anatomy) -> bool:
    """Whether the model has shortcut matrices."""
    model: Any = anatomy.model
    return bool(getattr(model.config, "sliced_hidden_size", None))


def parameters_after(anatomy: Anatomy, width: int, shared: bool) -> int:
    """Parameters of the whole model after a rotation to `width` dimensions, its head untied and
    shortcut matrices counted."""
    model, whole, count = anatomy.model, anatomy.hidden_size, len(anatomy.layers)
    head, embedding = _head_and_embedding(model)
    left, norms = (width if shared else whole), set(stream_norms(anatomy))
    last = anatomy.layers[-1].get_submodule(anatomy.architecture.mlp_output)
    total = anatomy.total_parameters
    has_own_head = head.weight is not embedding.weight
    total += left * len(head.weight) - has_own_head * head.weight.numel()
    (hidden,) = anatomy.of_kinds({"hidden"})
    for slot in hidden.slots:
        if slot.module is head:
            continue
        if slot.module in norms:
            after = width if shared else 0
        else:
            after = slot.tensor.numel() // whole * (left if slot.module is last else width)
        total += after - slot.tensor.numel()
    return total if shared else total + (2 * count - 1) * width**2 + width * whole


def _apply_shared(model: Any, anatomy: Anatomy, basis_DK: Tensor) -> None:
    whole, width = basis_DK.shape
    _fold_norms(model, anatomy)
    _rotate_head(model, basis_DK)
    embedding = model.get_input_embeddings()
    embedding.weight.data = _times(embedding.weight, basis_DK)
    for i, layer in enumerate(anatomy.layers):
        for linear in _readers(anatomy, i):
            linear.weight.data = _times(linear.weight, basis_DK)
        for path in _writers(anatomy):
            _rotate_output(layer.get_submodule(path), basis_DK)
    config = model.config
    for norm in stream_norms(anatomy):
        norm.weight.data = norm.weight.new_full((width,), (whole / width) ** 0.5)
        norm.variance_epsilon *= whole / width
    config.rms_norm_eps *= whole / width
    match_widths(model, anatomy.architecture, whole, width)
    config.hidden_size = width
    _settle(model)


def _apply_with_shortcuts(model: Any, anatomy: Anatomy, bases: Sequence[Tensor]) -> None:
    width, config = bases[0].shape[1], model.config
    _fold_norms(model, anatomy)
    _rotate_head(model, bases[-1])
    embedding = model.get_input_embeddings()
    embedding.weight.data = _times(embedding.weight, bases[0])
    embedding.embedding_dim = width
    config.sliced_hidden_size = width
    attention_out, mlp_out = _writers(anatomy)
    _, parts, _ = names_of(anatomy.architecture)
    for i, layer in enumerate(anatomy.layers):
        entering, middle, leaving = bases[2 * i : 2 * i + 3]
        attention, mlp = _readers_by_sublayer(anatomy, i)
        for linears, basis in ((attention, entering), (mlp, middle)):
            for linear in linears:
                linear.weight.data = _times(linear.weight, basis)
        _rotate_output(layer.get_submodule(attention_out), middle)
        _rotate_output(layer.get_submodule(mlp_out), leaving)
        sliced: Any = layer
        slice_layer(sliced, config, i == len(anatomy.layers) - 1, parts, mlp_out)
        sliced.attn_shortcut_Q.data = _times(entering.T, middle).to(sliced.attn_shortcut_Q)
        sliced.mlp_shortcut_Q.data = _times(middle.T, leaving).to(sliced.mlp_shortcut_Q)
    slice_trunk(_trunk(model, anatomy), config)
    _settle(model)


def _settle(model: Any) -> None:
    """Make configuration and modules say the new sizes."""
    after = find_anatomy(model)
    describe_model(model.config, after)
    adopt_geometry(after.layers, model.config)


def _fold_norms(model: Any, anatomy: Anatomy) -> None:
    """Move the norms' weights into the linears behind them."""
    architecture = anatomy.architecture
    for i, layer in enumerate(anatomy.layers):
        norms = architecture.reading_norms
        for name, linears in zip(norms, _readers_by_sublayer(anatomy, i), strict=True):
            norm: Any = getattr(layer, name)
            for linear in linears:
                _fold(norm, linear)
            norm.weight.fill_(1)
    norm, head = _trunk(model, anatomy).norm, model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    _fold(norm, head)
    norm.weight.fill_(1)


def _fold(norm: Any, linear: Any) -> None:
    weight = linear.weight.double() * norm.weight.double().to(linear.weight.device)
    linear.weight.copy_(weight)


def _rotate_head(model: Any, basis: Tensor) -> None:
    """The head has weights of its own by now."""
    head = model.get_output_embeddings()
    head.weight.data = _times(head.weight, basis)
    head.in_features = basis.shape[1]
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _times(left_RD: Tensor, right_DK: Tensor) -> Tensor:
    """The product, computed in float64, in the precision and place of the left."""
    product = left_RD.detach().double() @ right_DK.to(left_RD.device).double()
    return product.to(left_RD.dtype)


def _rotate_output(linear: Any, basis_DK: Tensor) -> None:
    """Rows, and the bias, by the transpose."""
    linear.weight.data = _times(linear.weight.T, basis_DK).T.contiguous()
    if linear.bias is not None:
        linear.bias.data = _times(linear.bias[None], basis_DK)[0]
    linear.out_features = basis_DK.shape[1]


def _readers_by_sublayer(anatomy: Anatomy, i: int) -> tuple[list[Any], list[Any]]:
    architecture, layer = anatomy.architecture, anatomy.layers[i]
    attention = [layer.get_submodule(f"{architecture.attention}.{n}") for n in architecture.qkv]
    return attention, [layer.get_submodule(path) for path in architecture.mlp_inputs]


def _readers(anatomy: Anatomy, i: int) -> Iterator[Any]:
    for linears in _readers_by_sublayer(anatomy, i):
        yield from linears


def _writers(anatomy: Anatomy) -> tuple[str, str]:
    """Paths of the linears that write to the stream."""
    architecture = anatomy.architecture
    return f"{architecture.attention}.{architecture.attention_output}", architecture.mlp_output


def _trunk(model: Any, anatomy: Anatomy) -> Any:
    return model.get_submodule(anatomy.architecture.layers.rpartition(".")[0])


def stream_norms(anatomy: Anatomy) -> list[Any]:
    """All norms that read the residual stream, the final one last."""
    architecture = anatomy.architecture
    found = [
        getattr(layer, name, None)
        for layer in anatomy.layers
        for name in architecture.reading_norms
    ]
    return [*found, getattr(_trunk(anatomy.model, anatomy), "norm", None)]


def _head_and_embedding(model: Any) -> tuple[Any, Any]:
    return model.get_output_embeddings(), model.get_input_embeddings()
