"""Fixtures shared by all tests. Nothing here or in any test reaches for the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from accel_runs import no_training_pictures as no_training_pictures
from accel_runs import request_ as request_
from accel_runs import shared_cache as shared_cache
from accel_runs import uninterrupted as uninterrupted
from adapt_pruner import CalibrationData
from adapt_pruner.cli import main
from atomic_runs import existing as existing
from atomic_runs import result as result
from checkpoints import llama_checkpoint as llama_checkpoint
from checkpoints import llama_result as llama_result
from checkpoints import readings as readings
from command_line import prune as prune
from evaluations import data as data
from evaluations import own_results as own_results
from latency_tables import times as times
from packings import jsonl as jsonl
from packings import pack as pack
from picomodels import VOCAB_SIZE, build, random_tokens
from refusals import refuse as refuse
from refusals import workplace as workplace
from report_runs import pruned as pruned
from report_runs import run as run

torch.set_num_threads(1)

STORIES260K = Path(__file__).parents[2] / "shared" / "data" / "stories260K"
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "as",
    "with",
    "be",
    "by",
    "at",
    "this",
    "had",
    "not",
    "are",
    "but",
    "from",
]


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capfd) -> Callable[..., Outcome]:
    """Run the command line in this process: `cli("prune", directory, "--sparsity", 0.2)`."""

    def run(*args: object) -> Outcome:
        capfd.readouterr()
        status = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and a vocabulary that fits the picomodels."""
    return character_tokenizer()


def character_tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    """Characters of ASCII and of `extra`; token 0 is unknown, 1 begins and 2 ends a text."""
    vocabulary = ["<unk>", "<s>", "</s>", "\n", *string.printable[:95], *extra]
    model = models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    assert len(vocabulary) <= VOCAB_SIZE or extra
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Forty documents of 30 words."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=30)) for _ in range(40)]


@pytest.fixture(scope="session")
def text_file(documents, tmp_path_factory) -> Path:
    """The documents as plain text."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def calibration() -> CalibrationData:
    """Random tokens for picomodels, 8 windows of 12."""
    return CalibrationData(random_tokens(20, 30), window_length=12, num_windows=8)


@pytest.fixture(scope="session")
def llama(tokenizer, tmp_path_factory) -> Path:
    """Directory of a tiny random Llama, weights in float32. Not to be written to."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    build("llama", torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """Directory of a real pretrained model of 260,032 parameters, where it is at hand."""
    if not STORIES260K.is_dir():
        pytest.skip(f"{STORIES260K} is not here")
    return STORIES260K
