"""Where a search keeps its study, its scores and its best model.

`OUTPUT/study/` holds the journal of all trials and the scores of the pool. The best model takes the
place of OUTPUT as a whole, with what the study is then; the journal's lock lies beside OUTPUT and
is held meanwhile, so that other workers lose no trial.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..claims import check_replaceable, claimed, write_record
from ..durable import flush_tree
from ..errors import InvalidSettings, WritingError, shown
from ..files import atomic_directory, check_output, place_of, write_atomically

STUDY, JOURNAL, POOL = "study", "journal.log", "pool-{}.safetensors"
NAME = "adapt-pruner"
"""Of the study in a database: one for each."""


class Lock:
    """A lock between processes that ends with the one that holds it, whatever ends that. Optuna's
    own make the others wait half a minute for a killed one, and leave a file."""

    def __init__(self, file: Path):
        self._lock = FileLock(file, poll_interval=0.01)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)  # while it is held
        self._lock.release()

    @contextmanager
    def held(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()


class Place:
    """The output of a search."""

    def __init__(self, output: Path, storage: str | None = None):
        self.output, self.storage = place_of(output), storage

    @property
    def journal(self) -> Path:
        return self.output / STUDY / JOURNAL

    def check(self, sources: Iterable[str | Path | None], overwrite: bool = False) -> None:
        """Raise WritingError now if the best model could not be written later."""
        is_search = (self.output / STUDY).is_dir()
        check_output(self.output, overwrite=is_search or overwrite)
        check_replaceable(self.output, sources, also_ours=(STUDY,) if is_search else ())

    def open_study(self, sampler: Any, pruner: Any, overwrite: bool, objectives: int = 1) -> Any:
        """The study, new or as it is. Raises InvalidSettings if the database cannot be opened."""
        import optuna

        if overwrite:
            shutil.rmtree(self.output / STUDY, ignore_errors=True)
        try:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            if overwrite and self.storage:
                known = optuna.get_all_study_names(storage=self.storage)
                if NAME in known:
                    optuna.delete_study(study_name=NAME, storage=self.storage)
            storage = self.storage or self._journal_storage()
            make = functools.partial(
                optuna.create_study, storage=storage, study_name=NAME, sampler=sampler,
                pruner=pruner, load_if_exists=True,
                directions=[optuna.study.StudyDirection.MINIMIZE] * objectives,
            )  # fmt: skip
            study = make()
            if len(study.directions) != objectives and not study.get_trials(deepcopy=False):
                optuna.delete_study(study_name=NAME, storage=storage)
                return make()
            return study
        except OSError as error:
            raise WritingError(
                f"'{self.output}' cannot hold the study: {error.strerror or error}."
            ) from error
        except Exception as error:  # of sqlalchemy and its drivers, and of a damaged journal
            where = self.storage or str(self.journal)
            raise InvalidSettings(
                f"The study in {shown(where)} cannot be opened ({type(error).__name__}: "
                f"{shown(str(error))}). Name another, or repair it."
            ) from error

    def _lock(self, what: str) -> Lock:
        return Lock(self.output.with_name(f".{self.output.name}.{what}"))

    def _journal_storage(self) -> Any:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        with self._lock("journal").held():
            self._cut_back_journal()
        lock: Any = self._lock("journal")  # optuna asks for no more than to acquire and release
        return JournalStorage(JournalFileBackend(str(self.journal), lock_obj=lock))

    def _cut_back_journal(self) -> None:
        """Remove a last line that a full disk or a crash has left half-written."""
        if not self.journal.exists():
            return
        with self.journal.open("r+b") as journal:
            content = journal.read()
            journal.truncate(content.rfind(b"\n") + 1)

    def stored_pool(self, length: int, key: str) -> dict[str, Tensor] | None:
        """The scores of samples of `length` tokens that were stored under a key, if they are there
        and whole."""
        file = self.output / STUDY / POOL.format(length)
        try:
            with safe_open(file, framework="pt") as opened:
                if (opened.metadata() or {}).get("key") != key:
                    return None
            return load_file(file)
        except (OSError, SafetensorError):
            return None

    def store_pool(self, length: int, key: str, tensors: dict[str, Tensor]) -> None:
        file = self.output / STUDY / POOL.format(length)
        write_atomically(file, save(tensors, metadata={"key": key}))

    def write(self, fill: Callable[[Path], None]) -> None:
        """Let `fill` write into a directory that then takes the place of the output. Workers of the
        study wait for each other. Raises WritingError if another run is at work there."""
        with (
            self._lock("writing").held(),
            claimed(self.output),
            ExitStack() as held,
            atomic_directory(self.output, overwrite=True) as partial,
        ):
            fill(partial)
            (partial / STUDY).mkdir()
            flush_tree(partial)
            if not self.storage:
                # Until the new directory is in its place.
                held.enter_context(self._lock("journal").held())
            for file in (self.output / STUDY).iterdir():
                if file.name == JOURNAL or file.match(POOL.format("*")):
                    shutil.copy2(file, partial / STUDY / file.name)
            write_record(partial)
