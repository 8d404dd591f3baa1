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
from .per_layer import LayerConfig, layer_config

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


def add_modeling_file(directory: Path, model: Any) -> None:
    """Write a modelling file for the checkpoint of `model` and name it in its configuration."""
    architecture = ARCHITECTURES[model.config.model_type]
    base = type(model).__name__
    text = _TEMPLATE.format(
        base=base,
        module=architecture.modeling_module,
        layer=architecture.layer_class,
        layer_config_class=inspect.getsource(LayerConfig),
        layer_config_function=inspect.getsource(layer_config),
    )
    (directory / FILE).write_text(text, encoding="utf-8")
    config_file = directory / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": f"{Path(FILE).stem}.Pruned{base}"}
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
