"""The commands that run a GGUF file: llama.cpp, Ollama, LM Studio, and this package."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GgufCommands:
    """What to type to run `file`, one entry per engine."""

    file: Path
    has_chat_template: bool = False

    @property
    def llama_cpp(self) -> list[str]:
        """A chat, or a continuation where the model has no chat template; then a server."""
        file = shlex.quote(str(self.file))
        first = (
            f"llama-cli -m {file}"
            if self.has_chat_template
            else f'llama-completion -m {file} -no-cnv -n 64 -p "Once upon a time"'
        )
        return [first, f"llama-server -m {file}"]

    @property
    def ollama(self) -> list[str]:
        """Ollama reads a Modelfile that names the GGUF file. Names of models have letters, digits,
        dots, hyphens and underscores, and begin with a letter or digit."""
        name = re.sub(r"[^a-z0-9._-]+", "-", self.file.stem.lower()).strip("._-") or "model"
        line = shlex.quote(f"FROM {self.file.resolve()}")
        return [
            f"echo {line} > {name}.Modelfile",
            f"ollama create {name} -f {name}.Modelfile",
            f"ollama run {name}",
        ]

    @property
    def lm_studio(self) -> list[str]:
        """LM Studio takes a copy of the file among its models; without --copy it would move it."""
        return [f"lms import --copy {shlex.quote(str(self.file))}"]

    @property
    def adapt_pruner(self) -> list[str]:
        """A first look with this package."""
        return [f'adapt-pruner run {shlex.quote(str(self.file))} "Once upon a time"']

    def by_engine(self) -> dict[str, list[str]]:
        """All of them by the engine's name, after those of this package."""
        return {
            "first look": self.adapt_pruner,
            "llama.cpp": self.llama_cpp,
            "Ollama": self.ollama,
            "LM Studio": self.lm_studio,
        }
