"""The model that is measured."""

from __future__ import annotations

import os
from typing import Any

from ..errors import InvalidSettings
from ..model.loading import (
    check_causal,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from ..settings import EvaluationSettings
from . import fingerprint


class Subject:
    """The model measured: its weights are loaded when the first result is missing."""

    def __init__(
        self, model: Any, tokenizer: Any, settings: EvaluationSettings, trust_remote_code: bool
    ):
        self.settings, self.trust_remote_code = settings, trust_remote_code
        self._model: Any = None
        if isinstance(model, (str, os.PathLike)):
            self.name = os.fspath(model)
            self.config = load_config(self.name, trust_remote_code, prunable=False)
        else:
            self._model, self.config = model, model.config
            self.name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        check_causal(self.config)
        if tokenizer is None and self._model is not None:
            raise InvalidSettings("A model in memory needs its tokenizer; got None.")
        self.tokenizer = (
            load_tokenizer(self.name, trust_remote_code) if tokenizer is None else tokenizer
        )
        if self._model is not None:
            self.device = str(self._model.device)
        else:
            self.device = settings.device_map or resolve_device(settings.device)
        self._key: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: Any, *arguments: Any) -> Subject:
        return model if isinstance(model, cls) else cls(model, *arguments)

    @property
    def model(self) -> Any:
        if self._model is None:
            dtype = "stored" if self.settings.dtype == "auto" else self.settings.dtype
            self._model = load_model(
                self.name,
                dtype,
                self.device if self.settings.device_map is None else "cpu",
                self.settings.device_map,
                self.trust_remote_code,
                prunable=False,
            )
        return self._model

    @property
    def key(self) -> dict[str, Any]:
        """What the model contributes to the key of a result."""
        if self._key is None:
            known = None
            if self._model is None:
                known = fingerprint.of_name(self.name, self.tokenizer, self.trust_remote_code)
            self._key = {
                "model": known or fingerprint.of_model(self.model, self.tokenizer),
                "dtype": self._dtype(),
                "device": self.device.split(":")[0],
            }
        return self._key

    def _dtype(self) -> str:
        if self._model is not None:
            return str(self._model.dtype).removeprefix("torch.")
        stored = getattr(self.config, "dtype", None)
        dtype = stored if self.settings.dtype == "auto" else self.settings.dtype
        return str(dtype or self.model.dtype).removeprefix("torch.")
