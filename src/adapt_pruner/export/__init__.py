"""Files for other engines: GGUF for llama.cpp and what is built on it."""

from .commands import GgufCommands as GgufCommands
from .gguf_file import Export as Export
from .gguf_file import Fallback as Fallback
from .gguf_file import export_gguf as export_gguf
