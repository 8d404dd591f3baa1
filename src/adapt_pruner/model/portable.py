"""A modelling file for checkpoints, for readers who do not import this package.

With it `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` needs nothing but
transformers, from 4.57 on. The file is generated from the code that this package itself runs. Its
classes have the names of transformers' own, so whatever looks a class up by its name (renamed
weights, the architecture that is written when the model is saved again, vLLM) finds the right one.
"""

from __future__ import annotations

import functools
import inspect
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .architectures import ARCHITECTURES, Architecture
from .layers import LayerConfig, at_import, extend_layer_class, layer_config

FILE = "modeling_pruned.py"

AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
"""Auto class -> transformers' table of the classes that it stands for."""

_FILE = '''"""{base} whose layers differ, written by adapt-pruner.

Each decoder layer is built from `config.per_layer_config`; all else is transformers' own.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

import {module} as _modeling

{sources}


_alter_layer = alter_layer  # the package imports it late, under this name

extend_layer_class("{layer}", "{attention}", {sublayers}, _modeling)
{slicing}
{classes}{renaming}'''

_CLASS = '''
if hasattr(_modeling, "{name}"):  # older versions lack some heads

    class {name}(_modeling.{name}):
        """A class of this file, so that saving the model takes the file along."""

    {name}.register_for_auto_class("{auto}")
'''

_RENAMING = """

# Classes whose weights are renamed while they load: transformers 5 asks code outside it to say so.
try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:  # transformers 4 does not rename
    pass
else:
    for _name in {names}:
        if (_mapping := get_checkpoint_conversion_mapping(_name)) is not None:
            register_checkpoint_conversion_mapping(_name, _mapping, overwrite=True)
"""


def add_modeling_file(directory: Path, model: Any) -> None:
    """Write a modelling file for the checkpoint of `model` and name it in its configuration."""
    auto_map = write_modeling_file(directory, model)
    _edit_config(directory, architectures=[_class_of_transformers(model)], auto_map=auto_map)


def write_modeling_file(directory: Path, model: Any) -> dict[str, str]:
    """Write the file alone. Returns the `auto_map` that a configuration needs for it."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from . import sliced

    architecture = ARCHITECTURES[model.config.model_type]
    classes = _classes_of(model)
    sources, slicing = _sources(), ""
    if getattr(model.config, "sliced_hidden_size", None):
        sources = (*sources, *sliced.SOURCES)
        names = ", ".join(map(repr, sliced.names_of(architecture)))
        slicing = f"extend_sliced_classes({names}, _modeling)\n"
    renamed = [name for name in classes.values() if get_checkpoint_conversion_mapping(name)]
    text = _FILE.format(
        base=_class_of_transformers(model),
        module=architecture.modeling_module,
        layer=architecture.layer_class,
        attention=architecture.attention,
        sublayers=architecture.sublayers,
        sources="\n\n".join(f"\n{inspect.getsource(one).rstrip()}" for one in sources),
        slicing=slicing,
        classes="\n".join(_CLASS.format(name=name, auto=auto) for auto, name in classes.items()),
        renaming=_RENAMING.format(names=renamed) if renamed else "",
    )
    (directory / FILE).write_text(text, encoding="utf-8")
    return {auto: f"{Path(FILE).stem}.{name}" for auto, name in classes.items()}


def _sources() -> tuple[Any, ...]:
    """What the file holds of this package: functions and classes that need only each other, torch,
    and the caches of transformers."""
    from . import skipped

    return (
        LayerConfig,
        layer_config,
        skipped.EmptyCacheLayer,
        skipped.Skipped,
        skipped.skip_sublayers,
        skipped.add_biases,
        skipped.alter_layer,
        extend_layer_class,
    )


def _classes_of(model: Any) -> dict[str, str]:
    """Auto class -> the class that transformers has for this type of model, where it has one."""
    from transformers.models.auto import modeling_auto

    model_type = model.config.model_type
    module = import_module(ARCHITECTURES[model_type].modeling_module)
    named = {
        auto: getattr(modeling_auto, table).get(model_type) for auto, table in AUTO_CLASSES.items()
    }
    named["AutoModelForCausalLM"] = _class_of_transformers(model)
    return {auto: name for auto, name in named.items() if name and hasattr(module, name)}


def drop_remote_code(directory: Path, model: Any) -> None:
    """Make the checkpoint that of the model's class in transformers, whatever it came from."""
    (directory / FILE).unlink(missing_ok=True)
    _edit_config(directory, architectures=[_class_of_transformers(model)], auto_map=None)


def register_portable() -> None:
    """Arrange for models whose configuration names the file to be saved with it.

    A class of the file takes the file along itself. Where this package is imported, a checkpoint
    also loads as transformers' own class, which would save an `auto_map` without its file.
    """
    at_import(_extend_saving)


def _extend_saving(architecture: Architecture, module: ModuleType) -> None:
    for name, base in list(vars(module).items()):
        is_base = name.endswith("PreTrainedModel") and base.__module__ == module.__name__
        if is_base and "save_pretrained" not in vars(base):
            base.save_pretrained = _saving_the_file(base.save_pretrained)


def _saving_the_file(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        named = (getattr(self.config, "auto_map", None) or {}).values()
        is_ours = any(str(name).startswith(f"{Path(FILE).stem}.") for name in named)
        if is_ours and self._auto_class is None and kwargs.get("is_main_process", True):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.config.auto_map = write_modeling_file(Path(save_directory), self)
        return original(self, save_directory, *args, **kwargs)

    return save_pretrained


def _class_of_transformers(model: Any) -> str:
    module = ARCHITECTURES[model.config.model_type].modeling_module
    return next(cls.__name__ for cls in type(model).__mro__ if cls.__module__ == module)


def _edit_config(directory: Path, **values: Any) -> None:
    """Set the keys in config.json, or remove those whose value is None."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **values}
    kept = {key: value for key, value in config.items() if key not in values or value is not None}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
