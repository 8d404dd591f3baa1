"""A modelling file for checkpoints, for readers who do not import this package.

With it `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` needs nothing but
transformers. The file is generated from the code that this package itself runs.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from .architectures import ARCHITECTURES
from .layers import LayerConfig, layer_config

FILE = "modeling_pruned.py"

_TEMPLATE = '''"""{base} whose layers differ in width, written by adapt-pruner.

Each decoder layer is built from `config.per_layer_config`; all else is transformers' own.
"""

from __future__ import annotations

from typing import Any

from {module} import {base}
from {module} import {layer} as _Layer
import {module} as _modeling


{layer_config_class}

{layer_config_function}

class Pruned{base}({base}):
    def __init__(self, config, *args, **kwargs):
        before = _modeling.{layer}
        _modeling.{layer} = lambda config, layer_idx: _Layer(
            layer_config(config, layer_idx), layer_idx
        )
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            _modeling.{layer} = before
'''

_RENAMING = """

# {base} renames weights while it loads; transformers looks that up by the class's name.
from transformers.conversion_mapping import (  # noqa: E402
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

register_checkpoint_conversion_mapping(
    "Pruned{base}", get_checkpoint_conversion_mapping("{base}"), overwrite=True
)
"""
"""For the classes that need it alone: the module is none that transformers promises to keep."""


def add_modeling_file(directory: Path, model: Any) -> None:
    """Write a modelling file for the checkpoint of `model` and name it in its configuration."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    architecture = ARCHITECTURES[model.config.model_type]
    base = _class_of_transformers(model)
    template = _TEMPLATE + (_RENAMING if get_checkpoint_conversion_mapping(base) else "")
    text = template.format(
        base=base,
        module=architecture.modeling_module,
        layer=architecture.layer_class,
        layer_config_class=inspect.getsource(LayerConfig),
        layer_config_function=inspect.getsource(layer_config),
    )
    (directory / FILE).write_text(text, encoding="utf-8")
    auto_map = {"AutoModelForCausalLM": f"{Path(FILE).stem}.Pruned{base}"}
    _edit_config(directory, architectures=[base], auto_map=auto_map)


def drop_remote_code(directory: Path, model: Any) -> None:
    """Make the checkpoint that of the model's class in transformers, whatever it came from."""
    (directory / FILE).unlink(missing_ok=True)
    _edit_config(directory, architectures=[_class_of_transformers(model)], auto_map=None)


def _class_of_transformers(model: Any) -> str:
    module = ARCHITECTURES[model.config.model_type].modeling_module
    return next(cls.__name__ for cls in type(model).__mro__ if cls.__module__ == module)


def _edit_config(directory: Path, **values: Any) -> None:
    """Set the keys in config.json, or remove those whose value is None."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **values}
    kept = {key: value for key, value in config.items() if key not in values or value is not None}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
