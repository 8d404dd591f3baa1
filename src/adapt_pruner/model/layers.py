"""Teach transformers' decoder layers to read `config.per_layer_config`.

transformers validates, stores and serialises what a layer has of its own, and its caches understand
it, but its decoder layers are still built from the global configuration. What is missing is small:

- build layer i from the widths of layer i;
- leave out what `skip` names, such as ["mlp"];
- give a bias to the linears that `added_biases` names, where the architecture offers none;
- cut the residual stream to `sliced_hidden_size`, with shortcut matrices (`sliced`).

It is added to a layer class at the moment transformers imports the modelling file, so importing
`adapt_pruner` costs nothing and loads nothing.

The class itself is extended instead of replaced (`transformers.monkey_patching`): replacing breaks
`output_hidden_states` of models built directly from their class, because output recorders then look
for the replacement, and does not reach `LlamaForCausalLM(config)` at all.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import wrapt

from .architectures import ARCHITECTURES, Architecture


class LayerConfig:
    """The model's configuration as one decoder layer sees it: its own values, all else live.

    A view and not a copy, so that a later `model.set_attn_implementation(...)` reaches the layers.
    """

    def __init__(self, config: Any, overrides: dict[str, Any]):
        self.__dict__.update(overrides, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._config, name)


def layer_config(config: Any, layer_idx: int) -> Any:
    """Return what layer `layer_idx` is built from: `config` itself where all layers are equal."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    layer = config.per_layer_config[layer_idx]
    names = {*config.per_layer_attributes, "skip"}
    return LayerConfig(config, {name: getattr(layer, name) for name in names})


def alter_layer(layer: Any, config: Any, attention: str, sublayers: Any) -> None:
    """Leave out and add what the layer's own `config` says. Mutates `layer`."""
    from .skipped import add_biases, skip_sublayers

    add_biases(layer, getattr(config, "added_biases", None) or ())
    skip_sublayers(layer, getattr(config, "skip", None) or (), attention, sublayers)


def _sliced_config(config: Any, own: Any) -> Any:
    """The configuration of a layer with as many hidden dimensions as SliceGPT has left it."""
    width = getattr(config, "sliced_hidden_size", None)
    return LayerConfig(own, {"hidden_size": width}) if width else own


def _extend_layer_class(architecture: Architecture, module: ModuleType) -> None:
    layer_class = getattr(module, architecture.layer_class, None)
    if layer_class is None or hasattr(layer_class.__init__, "__wrapped__"):
        return
    original = layer_class.__init__

    @functools.wraps(original)
    def __init__(self, config, layer_idx, *args, **kwargs):
        own = _sliced_config(config, layer_config(config, layer_idx))
        original(self, own, layer_idx, *args, **kwargs)
        alter_layer(self, own, architecture.attention, architecture.sublayers)
        if getattr(config, "sliced_hidden_size", None):
            from .sliced import slice_layer

            slice_layer(self, config, layer_idx == config.num_hidden_layers - 1, architecture)

    layer_class.__init__ = __init__
    if architecture.reads_through_norms:
        _extend_trunk_class(architecture, module)


def _extend_trunk_class(architecture: Architecture, module: ModuleType) -> None:
    """The model around the layers has embeddings and a final norm of its own if it is sliced."""
    trunk_class = getattr(module, architecture.layer_class.replace("DecoderLayer", "Model"), None)
    if trunk_class is None:
        return
    original = trunk_class.__init__

    @functools.wraps(original)
    def __init__(self, config, *args, **kwargs):
        original(self, config, *args, **kwargs)
        if getattr(config, "sliced_hidden_size", None):
            from .sliced import slice_trunk

            slice_trunk(self, config)

    trunk_class.__init__ = __init__


def _is_not_about_global_widths(record: logging.LogRecord) -> bool:
    return "Reading global config value for per-layer attribute" not in str(record.msg)


def _register(architecture: Architecture) -> None:
    hook = functools.partial(_extend_layer_class, architecture)
    wrapt.register_post_import_hook(hook, architecture.modeling_module)


def _register_foreign(transformers: ModuleType) -> None:
    for name in ARCHITECTURES.foreign:
        _register(ARCHITECTURES[name])


def register() -> None:
    """Arrange for every supported layer class to be extended when its module is imported."""
    for architecture in ARCHITECTURES.own.values():
        _register(architecture)
    wrapt.register_post_import_hook(_register_foreign, "transformers")
    # Our checkpoints declare that reading a global width is intended; the warning is noise.
    logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(
        _is_not_about_global_widths
    )
