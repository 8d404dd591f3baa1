"""Tokenise what a run needs of a mixture, once, packed into windows that stay on disk.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .domains import DomainCache, LossOn, OnTokenised, PackedDomain
from .fingerprints import short_hash
from .mixture import Mixture, Source, read_mixture

GROWTH = 4
"""With the dynamic policy, each domain is prepared for so many times its first share: the weight
that grew most in Sheared-LLaMA, that of C4, grew 3.3-fold (0.15 to 0.492)."""


@dataclass(frozen=True, eq=False)
class PackedData:
    """All domains of a mixture, ready to draw from with a `WindowSampler`."""

    domains: list[PackedDomain]
    sequence_length: int
    repeat: bool
    mixture: Mixture
    fingerprint: str
    """Changes with the windows and with their proportions, not with where they come from."""

    @property
    def num_tokens(self) -> int:
        return sum(domain.num_tokens for domain in self.domains)

    @property
    def may_repeat(self) -> bool:
        """Whether a domain that has given all it has begins again. With the dynamic policy it does:
        nobody knows in advance how much of it will be wanted."""
        return self.repeat or self.mixture.policy == "dynamic"

    def describe(self) -> list[str]:
        """A line per domain on what was found and taken."""
        return [_describe(domain, self.sequence_length) for domain in self.domains]


def prepare(
    mixture: Mixture | str | Path,
    tokenizer: Any,
    *,
    tokens: int,
    cache: str | Path,
    sequence_length: int = 1024,
    loss_on: LossOn = "all",
    repeat: bool = False,
    exclude: str | Path | Iterable[str] | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    on_progress: OnTokenised | None = None,
) -> PackedData:
    """Tokenise what a budget needs of each source, or take it from the cache. Processes that
    prepare the same at the same time do it once: one works, the others wait.

    Args:
        mixture: see `read_mixture`.
        tokens: budget of the run, rounded up to whole windows.
        cache: directory of what was tokenised, with one directory per domain.
        sequence_length: T. Windows have no padding; a document may go on in the next one.
        loss_on: "answers": chats and instructions have loss on the answers, text everywhere.
        repeat: let a source that is too small be drawn again and again.
        exclude: text, named like a mixture, or documents; what overlaps with any column of it (of
            "pydocs": with its held-out part) is dropped, see `Overlap`.
        seed: of the order in which documents are read.
        vocab_size: rows of the model's embedding, to notice a tokenizer of another model.

    Raises:
        DataError: for data that are missing, malformed or too small, see `read_rows`, `detect`.
        WritingError: if the cache cannot be written.
    """
    mixture = read_mixture(mixture)
    _check(tokenizer, sequence_length, tokens, loss_on)
    store = DomainCache(
        Path(cache).expanduser(), mixture, tokenizer, sequence_length, vocab_size=vocab_size,
        loss_on=loss_on, exclude=_to_exclude(exclude), seed=seed,
    )  # fmt: skip
    sources = [source for source in mixture.sources if source.weight]
    total = -(-tokens // sequence_length)
    shares, domains = _shares(mixture, sources, total), []
    for source, _, most in shares:
        store.check(source, most)
    for source, needed, most in shares:
        domain = store.domain(source, most, on_progress or _ignore)
        _check_size(domain, needed, total, len(sources), sequence_length, repeat)
        domains.append(domain)
    fingerprint = _fingerprint(domains, sequence_length)
    return PackedData(domains, sequence_length, repeat, mixture, fingerprint)


def _fingerprint(domains: list[PackedDomain], sequence_length: int) -> str:
    contents = [[d.name, round(d.weight, 9), d.account.digest] for d in domains]
    return short_hash([sequence_length, contents])


def _shares(mixture: Mixture, sources: list[Source], total: int) -> list[tuple[Source, int, int]]:
    """Each source with the windows that it must give at least, and may give at most."""
    shares = []
    for source in sources:
        needed = windows_needed(total, source.weight, len(sources))
        most = needed if mixture.policy == "fixed" else min(GROWTH * needed, total)
        shares.append((source, needed, most))
    return shares


def windows_needed(total: int, weight: float, num_domains: int) -> int:
    """The most windows that `WindowSampler` draws of a domain in a run of `total`; at least one."""
    return min(max(math.floor(total * weight + _slack(num_domains) + 1e-9), 1), total)


def _slack(num_domains: int) -> float:
    return 1 - 1 / (2 * num_domains - 2) if num_domains > 1 else 0.0


def _to_exclude(exclude: str | Path | Iterable[str] | None) -> Mixture | list[str] | None:
    if isinstance(exclude, str | Path):
        return read_mixture(exclude)
    return None if exclude is None else list(exclude)


def _ignore(name: str, done: int, needed: int) -> None: ...


def _check(tokenizer: Any, sequence_length: int, tokens: int, loss_on: str) -> None:
    if sequence_length < 2:
        raise DataError(f"A window must have at least 2 tokens; got {sequence_length}.")
    if tokens < sequence_length:
        raise DataError(
            f"The budget must be at least one window of {sequence_length:,} tokens; got {tokens:,}."
        )
    if loss_on not in ("all", "answers"):
        raise DataError(f"Loss can be on 'all' or 'answers'; got '{loss_on}'.")
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no EOS token to join documents with. Set tokenizer.eos_token."
        )


def _check_size(
    domain: PackedDomain, needed: int, total: int, num_domains: int, length: int, repeat: bool
) -> None:
    """Refuse a domain that cannot give what it must."""
    name, has = domain.name, domain.num_windows
    if not has:
        raise DataError(
            f"Domain '{name}' has {domain.account.tokens_read:,} tokens, not one window of "
            f"{length:,}. Give it more text, or take shorter windows."
        )
    if has < needed and not repeat:
        possible = math.ceil((has + 1 - _slack(num_domains) - 1e-9) / domain.weight) - 1
        raise DataError(
            f"Domain '{name}' has {domain.num_tokens:,} tokens, but its share {domain.weight:.4g} "
            f"of {total * length:,} needs {needed * length:,}: the budget is larger than the data. "
            f"Pass --repeat to draw them again, or take at most --tokens {possible * length}."
        )


def _describe(domain: PackedDomain, length: int) -> str:
    account = domain.account
    parts = [
        f"{domain.name}: {account.format} ({', '.join(account.columns.values())})",
        f"{domain.num_tokens:,} tokens in {domain.num_windows:,} windows of {length:,}",
        f"from {account.documents:,} documents",
    ]
    if domain.answers is not None:
        parts.append(f"loss on {account.answer_tokens / domain.num_tokens:.1%}")
    if account.dropped:
        parts.append(f"{account.dropped:,} dropped (overlap with the text to exclude)")
    if account.refused:
        parts.append(f"{account.refused:,} refused by the chat template ({account.refusal})")
    if account.exhausted:
        parts.append("all there is")
    return ", ".join(parts)
