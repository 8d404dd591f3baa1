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
from collections.abc import Callable
from importlib import import_module
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
    if getattr(config, "is_heterogeneous", False):
        layer = config.per_layer_config[layer_idx]
        names = {*config.per_layer_attributes, "skip"}
        return LayerConfig(config, {name: getattr(layer, name) for name in names})
    stored = getattr(config, "per_layer_config", None)
    if isinstance(stored, dict):  # transformers 4 keeps what stands in config.json as it is
        by_layer = {int(layer): overrides for layer, overrides in stored.items()}
        return LayerConfig(config, by_layer.get(layer_idx, {}))
    return config


def _alter_layer(layer: Any, config: Any, attention: str, sublayers: Any) -> None:
    """Leave out and add what the layer's own `config` says. Mutates `layer`."""
    from . import skipped  # needs torch, which `import adapt_pruner` alone does not load

    skipped.alter_layer(layer, config, attention, sublayers)


def extend_layer_class(class_name: str, attention: str, sublayers: Any, module: ModuleType) -> None:
    """Let a decoder layer class read `per_layer_config`. Mutates the class, once.

    Args:
        attention: name of the attention module in a layer.
        sublayers: module that a layer can do without -> names of its norms.
    """
    layer_class = getattr(module, class_name, None)
    if layer_class is None or hasattr(layer_class.__init__, "__wrapped__"):
        return
    original = layer_class.__init__

    @functools.wraps(original)
    def __init__(self, config, layer_idx, *args, **kwargs):
        own = layer_config(config, layer_idx)
        original(self, own, layer_idx, *args, **kwargs)
        _alter_layer(self, own, attention, sublayers)

    layer_class.__init__ = __init__


def _is_not_about_global_widths(record: logging.LogRecord) -> bool:
    return "Reading global config value for per-layer attribute" not in str(record.msg)


def at_import(hook: Callable[[Architecture, ModuleType], None]) -> None:
    """Call `hook` with every supported architecture when its modelling file is imported.

    A row of another package is loaded when the first model of its type is built: then this package
    is whole, and the row may stand beside whatever needs it; and only that model fails if the row
    cannot be imported.
    """
    for architecture in ARCHITECTURES.own.values():
        wrapt.register_post_import_hook(
            functools.partial(hook, architecture), architecture.modeling_module
        )
    if ARCHITECTURES.foreign:
        wrapt.register_post_import_hook(
            functools.partial(_before_first_model, hook), "transformers.modeling_utils"
        )


def _before_first_model(hook: Callable[[Architecture, ModuleType], None], utils: Any) -> None:
    """Extend the constructor that every model calls before it builds its layers."""
    original, waiting = utils.PreTrainedModel.__init__, set(ARCHITECTURES.foreign)

    @functools.wraps(original)
    def __init__(self, config, *args, **kwargs):
        model_type = getattr(config, "model_type", None)
        if model_type in waiting:
            waiting.discard(model_type)
            architecture = ARCHITECTURES[model_type]
            hook(architecture, import_module(architecture.modeling_module))
        original(self, config, *args, **kwargs)

    utils.PreTrainedModel.__init__ = __init__


def _extend(architecture: Architecture, module: ModuleType) -> None:
    extend_layer_class(
        architecture.layer_class, architecture.attention, architecture.sublayers, module
    )
    if architecture.reads_through_norms:
        from . import sliced  # needs torch, as the module has

        sliced.extend_sliced_classes(*sliced.names_of(architecture), module)


def register() -> None:
    """Arrange for every supported layer class to be extended when its module is imported."""
    at_import(_extend)
    # Our checkpoints declare that reading a global width is intended; the warning is noise.
    logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(
        _is_not_about_global_widths
    )
