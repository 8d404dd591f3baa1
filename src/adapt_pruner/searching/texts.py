"""The texts of a search: what samples come from, what trials are measured on, what no trial saw."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from ..data.calibration import read_documents
from ..data.overlap import Overlap
from ..errors import CalibrationError, shortened
from ..evaluation import evaluation_texts
from .request import SearchRequest


def read_texts(request: SearchRequest) -> dict[str, list[str]]:
    """The documents that models are measured on, by the name of the text.

    Raises:
        CalibrationError: if two of the texts share something, which it shows.
    """
    settings, texts = request.settings, {}
    calibration = f"calibration text '{settings.calibration}'"
    for name, source in (("validation", request.validation), ("held-out", request.heldout)):
        texts[name] = evaluation_texts(source, settings.text_column) if source else []
        overlap = Overlap(texts[name])
        documents = read_documents(settings.calibration, settings.text_column, settings.seed)
        _check(overlap, f"{name} text '{source}'", islice(documents, settings.max_documents),
               calibration)  # fmt: skip
        if name == "held-out":
            _check(overlap, f"{name} text '{source}'", texts["validation"],
                   f"validation text '{request.validation}'")  # fmt: skip
    return texts


def _check(overlap: Overlap, text: str, documents: Iterable[str], what: str) -> None:
    """Raise CalibrationError with the first of the documents that the text holds, too."""
    for number, document in enumerate(documents):
        if overlap.contains(document):
            raise CalibrationError(
                f'The {text} overlaps with the {what}: both hold "{shortened(document, 100)}" '
                f"(document {number}). Take texts that share nothing."
            )
