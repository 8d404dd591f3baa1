"""How fast are pruned models in real engines, beside what their size promises?

    python benchmarks/engines.py DENSE PRUNED... --json FILE [--types F32,Q8_0] [--rounds 5]
        [--prompt 128] [--new 32] [--vllm ENVIRONMENT/bin/python]

A MODEL is NAME=DIRECTORY, or a directory; the dense one comes first. Each is read by torch (as
stored) and by llama.cpp (a GGUF file of each type), on one thread, all in turns: one round of all
after the other, the first to warm up. A round reads a prompt and writes greedily from its cache.
Times are those that the processor spent on this process, so that others at work on the machine
count little. A speed-up is the median over the rounds of the dense model's time over the other's.

With --vllm, the models are also read by vLLM in an environment that has it and this package: each
in a process of its own (`vllm_times.py`), through transformers' classes, in float32. Its memory is
not measured, because it takes a fixed part of the machine's for its cache.

Ideal is the ratio of operations for reading a prompt, and of bytes of weights read for writing.
Memory is the most that a process of its own has in use while it does all of it, beyond what it has
before it loads the model. Rounds that FILE holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from adapt_pruner import export_gguf, load_model
from adapt_pruner.evaluation.bench import _decode_bytes, _prefill_flops
from adapt_pruner.evaluation.fingerprint import versions
from adapt_pruner.evaluation.speed import generate, random_prompt
from adapt_pruner.files import write_json_atomically

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

TORCH, VLLM = "torch", "vLLM"
Times = tuple[float, float]
"""Seconds of reading the prompt, and of writing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--types", default="F32,Q8_0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="time vLLM, too, by its Python")
    parser.add_argument("--peak", metavar="ENGINE", help="print the memory of one model in one")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.peak:
        print(_peak_here(arguments))
        return
    models = dict(_named(model) for model in arguments.models)
    sizes = {"prompt": arguments.prompt, "new": arguments.new}
    found = json.loads(arguments.json.read_text("utf-8")) if arguments.json.is_file() else {}
    if found.get("sizes") != sizes:
        found = {"format": 1, "sizes": sizes, "models": {}, "rounds": []}
    found["versions"] = versions("xllamacpp", "libgguf")
    with tempfile.TemporaryDirectory() as place:
        engines = {TORCH: models} | {
            kind: {
                name: str(export_gguf(directory, Path(place) / f"{name}-{kind}.gguf", kind).file)
                for name, directory in models.items()
            }
            for kind in filter(None, arguments.types.split(","))
        }
        if arguments.vllm:
            engines[VLLM] = models
        for name, directory in models.items():
            if name not in found["models"]:
                found["models"][name] = _facts(directory, arguments, engines, name)
                write_json_atomically(arguments.json, found)
        for engine, files in engines.items():
            _run_rounds(engine, files, arguments, found)
    show(found)


def _named(model: str) -> tuple[str, str]:
    name, _, directory = model.rpartition("=")
    return name or Path(directory).name, directory


def _facts(
    directory: str, arguments: argparse.Namespace, engines: dict[str, dict[str, str]], name: str
) -> dict[str, Any]:
    """What the model's size promises, and the memory it takes in each engine."""
    model: Any = load_model(directory, "stored", "cpu", prunable=False)
    facts = {
        "parameters": model.num_parameters(),
        "prefill_flops": _prefill_flops(model, arguments.prompt, 1),
        "read_bytes": {TORCH: _decode_bytes(model)},
        "peak_bytes": {},
    }
    del model
    for engine, files in engines.items():
        if engine == VLLM:
            facts["read_bytes"][engine] = facts["read_bytes"][TORCH]
            continue
        if engine != TORCH:
            facts["read_bytes"][engine] = _tensor_bytes(Path(files[name]))
        sizes = ["--prompt", str(arguments.prompt), "--new", str(arguments.new)]
        command = [sys.executable, __file__, files[name], *sizes, "--peak", engine]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        facts["peak_bytes"][engine] = int(done.stdout)
    return facts


def _tensor_bytes(file: Path) -> int:
    """Of the file without its header; a head that is tied to the embeddings reads all of them."""
    from adapt_pruner.model.gguf_input import read_header

    return file.stat().st_size - read_header(file).data_start


def _peak_here(arguments: argparse.Namespace) -> int:
    """Memory that reading and writing once takes, in this process."""
    (file,) = arguments.models
    if arguments.peak != TORCH:
        import llama_cpp  # noqa: F401
    before = _resident()
    open_engine(arguments.peak, file, arguments)()
    return _resident() - before


def _resident() -> int:
    """The most bytes of memory that this process has had (Linux; what getrusage says begins with
    that of the parent)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def open_engine(engine: str, file: str, arguments: argparse.Namespace) -> Callable[[], Times]:
    """Load a model; each call of what is returned reads a prompt and writes, once."""
    if engine == VLLM:
        return _open_vllm(file, arguments)
    if engine == TORCH:
        model: Any = load_model(file, "stored", "cpu", prunable=False)
        ids = random_prompt(model, arguments.prompt)

        @torch.no_grad()
        def in_torch() -> Times:
            times = [time.process_time()]
            generate(model, ids, arguments.new, lambda: times.append(time.process_time()))
            return times[1] - times[0], time.process_time() - times[1]

        return in_torch

    from llama_cpp import LlamaCpp

    loaded = LlamaCpp(Path(file), context=arguments.prompt + arguments.new, exact=False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(loaded.size, (arguments.prompt,), generator=generator).tolist()

    def in_llama_cpp() -> Times:
        loaded.forget()
        start = time.process_time()
        token = loaded.next_token(tokens, 0)
        middle = time.process_time()
        for place in range(arguments.prompt, arguments.prompt + arguments.new):
            token = loaded.next_token([token], place)
        return middle - start, time.process_time() - middle

    return in_llama_cpp


def _open_vllm(directory: str, arguments: argparse.Namespace) -> Callable[[], Times]:
    """A process that ends with this one, because its input does."""
    command = [str(arguments.vllm), str(Path(__file__).with_name("vllm_times.py")), directory]
    worker = subprocess.Popen(
        [*command, str(arguments.prompt), str(arguments.new)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip

    def answer() -> Any:
        if not (line := worker.stdout.readline()):  # type: ignore[union-attr]
            sys.exit(f"vLLM ended with status {worker.wait()}: {' '.join(command)}")
        return json.loads(line)

    def in_vllm() -> Times:
        print(file=worker.stdin, flush=True)
        reading, writing = answer()
        return reading, writing

    assert answer() == "ready"
    return in_vllm


def _run_rounds(
    engine: str, files: dict[str, str], arguments: argparse.Namespace, found: dict[str, Any]
) -> None:
    done = sum(one["engine"] == engine for one in found["rounds"])
    if done >= arguments.rounds:
        return
    runs = {name: open_engine(engine, file, arguments) for name, file in files.items()}
    for run in runs.values():
        run()  # to warm up
    for number in range(done, arguments.rounds):
        seconds = {name: run() for name, run in runs.items()}
        found["rounds"].append({"engine": engine, "round": number, "seconds": seconds})
        write_json_atomically(arguments.json, found)


def show(found: dict[str, Any]) -> None:
    """A row per engine and model: tokens per second, speed-ups beside ideal ones, and memory."""
    models, sizes = found["models"], found["sizes"]
    dense = next(iter(models))
    print("engine model      prefill tok/s  gain ideal   decode tok/s  gain ideal   MB peak")
    for engine in dict.fromkeys(one["engine"] for one in found["rounds"]):
        rounds = [one["seconds"] for one in found["rounds"] if one["engine"] == engine]
        for name, facts in models.items():
            cells = []
            first = models[dense]
            ideal = (
                first["prefill_flops"] / facts["prefill_flops"],
                first["read_bytes"][engine] / facts["read_bytes"][engine],
            )
            for i, tokens in enumerate((sizes["prompt"], sizes["new"])):
                speed = tokens / statistics.median(times[name][i] for times in rounds)
                gain = statistics.median(times[dense][i] / times[name][i] for times in rounds)
                cells.append(f"{speed:13.1f} {gain:5.2f} {ideal[i]:5.2f}")
            peak = facts["peak_bytes"].get(engine)
            memory = f"{peak / 1e6:9.0f}" if peak else ""
            print(f"{engine:<7}{name:<12}{'  '.join(cells)} {memory}".rstrip())


if __name__ == "__main__":
    main()
