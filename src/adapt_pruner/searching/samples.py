"""The calibration text of a search, read once, and the pools of samples that come from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..api import check_window_length
from ..data import CalibrationData
from ..data.calibration import sourced_documents
from ..data.fingerprints import short_hash
from ..methods import method_named
from ..methods.ada_pruner import AdaPrunerSettings, check_enough, sample_pool
from ..model.anatomy import Anatomy
from ..precision import compute_dtype_of
from ..score.collect import Pass
from ..settings import PruneSettings
from .place import Place
from .pool import Pool, by_source, grouped, score_pool
from .request import SearchSettings


class Samples:
    """Windows of any length for trials; for ada-pruner a pool of each length, scored when a trial
    first asks for it and stored in the place of the study.

    Args:
        name: of the model, which scores depend on.
        place: None stores nothing.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        tokenizer: Any,
        settings: PruneSettings,
        search: SearchSettings,
        name: str = "",
        place: Place | None = None,
        on_pool: Callable[[float], None] = lambda share: None,
    ):
        self.model, self.anatomy, self.settings, self.search = model, anatomy, settings, search
        self.name, self.place, self.on_pool = name, place, on_pool
        self.compute_dtype = compute_dtype_of(settings.compute_dtype, model)
        self._pools: dict[int, Pool] = {}
        self._groups: dict[int, Tensor] = {}
        self.documents = sourced_documents(
            settings.calibration,
            tokenizer,
            settings.text_column,
            settings.max_documents,
            settings.seed,
            model.get_input_embeddings().weight.shape[0],
        )

    def calibration(self, settings: PruneSettings) -> CalibrationData:
        """What `prune` would load for these settings.

        Raises:
            InvalidSettings, CalibrationError: if the model reads no such windows, or there are too
                few.
        """
        check_window_length(self.model.config, settings)
        found = CalibrationData(
            [tokens for tokens, _ in self.documents],
            settings.window_length,
            settings.windows,
            settings.seed,
            settings.redraw,
            f"Calibration text '{settings.calibration}'",
        )
        if isinstance(settings, AdaPrunerSettings):
            size = min(len(found.documents), settings.pool)
            check_enough(size, settings.windows, settings.window_length)
        return found

    def pool(self, settings: AdaPrunerSettings) -> Pool:
        """The samples of the settings' length, and what each of them adds to the scores."""
        length = settings.window_length
        if length not in self._pools:
            windows_PT = sample_pool(self.calibration(settings), settings.pool)
            self._pools[length] = self._stored(length, windows_PT) or self._scored(windows_PT)
        return self._pools[length]

    def group_P(self, settings: AdaPrunerSettings) -> Tensor:
        """(P,) int64, the group of each sample of that pool."""
        length = settings.window_length
        if length not in self._groups:
            pool, how = self.pool(settings), self.search
            self._groups[length] = (
                by_source(self.sources(settings), how.groups)
                if how.describe == "source"
                else grouped(pool, how.describe, how.groups, self.settings.seed)
            )
        return self._groups[length]

    def sources(self, settings: AdaPrunerSettings) -> list[str]:
        """Where each sample of that pool comes from."""
        length = settings.window_length
        found = [source for tokens, source in self.documents if len(tokens) >= length]
        return found[: settings.pool]

    def _key(self, windows_PT: Tensor) -> str:
        precision = [self.settings.dtype, str(self.compute_dtype)]
        return short_hash([self.name, *precision, windows_PT.tolist()])

    def _stored(self, length: int, windows_PT: Tensor) -> Pool | None:
        stored = self.place and self.place.stored_pool(length, self._key(windows_PT))
        return Pool.of_tensors(stored) if stored else None

    def _scored(self, windows_PT: Tensor) -> Pool:
        axes = self.anatomy.of_kinds(method_named(self.settings.method).cuts)
        how = Pass(compute_dtype=self.compute_dtype)
        pool = score_pool(self.model, self.anatomy, axes, windows_PT, how, self.on_pool)
        if self.place:
            self.place.store_pool(windows_PT.shape[1], self._key(windows_PT), pool.tensors())
        return pool
