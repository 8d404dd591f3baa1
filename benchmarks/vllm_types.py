"""Which types of model does vLLM's transformers backend serve when their layers differ?

    python benchmarks/vllm_types.py --python ENVIRONMENT/bin/python [TYPE ...] --json FILE

Builds a tiny random model of each type with heads of 32 entries, takes neurons and KV groups from
its layers, unequally, and writes it. `LLM(DIR, model_impl="transformers")` then reads it in a
process of its own, which imports nothing of this package: vLLM looks the entry point up. Its
log-probabilities of 29 tokens are compared with those of the model in memory. "llama, altered" has
a layer without an MLP and a bias that its configuration does not offer. `--portable` reads with
`trust_remote_code` and without the entry point.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

READER = """
import json, sys
directory, trust, tokens = sys.argv[1], sys.argv[2] == "portable", json.loads(sys.argv[3])
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM(
        model=directory, model_impl="transformers", dtype="float32", enforce_eager=True,
        max_model_len=48, skip_tokenizer_init=True, trust_remote_code=trust,
    )
    wanted = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0, detokenize=False)
    found = llm.generate([{"prompt_token_ids": tokens}], wanted)[0].prompt_logprobs
    print("FOUND", json.dumps({
        "imported": "adapt_pruner" in sys.modules,
        "values": [entry[token].logprob for token, entry in zip(tokens[1:], found[1:])],
    }))
"""
ALTERED = "llama, altered"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("types", nargs="*")
    parser.add_argument("--python", required=True, help="the one of vLLM's environment")
    parser.add_argument("--portable", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from picomodels import PICO

    rows = {}
    with TemporaryDirectory() as home:
        for name in args.types or [*PICO, ALTERED]:
            rows[name] = measure(name, Path(home), args)
            print(name, rows[name], flush=True)
            if args.json:
                result = {"portable": args.portable, "types": rows}
                args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(name: str, home: Path, args: argparse.Namespace) -> dict[str, object]:
    import torch

    directory, tokens, expected = make(name, home)
    how = "portable" if args.portable else "plugin"
    environment = {
        **os.environ,
        "PYTHONPATH": "",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **({"VLLM_PLUGINS": ""} if args.portable else {}),
    }
    done = subprocess.run(
        [args.python, "-c", READER, directory, how, json.dumps(tokens)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    found = next((line[6:] for line in lines if line.startswith("FOUND ")), None)
    if found is None:
        errors = [line for line in done.stderr.splitlines() if "Error: " in line]
        return {"served": False, "error": (errors or [f"status {done.returncode}"])[-1][-200:]}
    answer = json.loads(found)
    assert answer["imported"] != args.portable, "the entry point is what is measured"
    difference = (torch.tensor(answer["values"]) - expected).abs().max().item()
    return {"served": True, "largest_difference": difference}


def make(name: str, home: Path):
    """Write a model. Returns its directory, tokens, and their log-probabilities."""
    import torch

    from adapt_pruner.model.edits import AddBias, Cut
    from adapt_pruner.model.older_readers import add_old_keys
    from adapt_pruner.model.portable import add_modeling_file
    from picomodels import PICO, build, logits_of, random_tokens

    torch.set_num_threads(1)
    model_type = "llama" if name == ALTERED else name
    sizes: dict[str, object] = {"hidden_size": 256}
    sizes |= {key: 32 for key in ("head_dim", "query_pre_attn_scalar") if key in PICO[model_type]}
    if name == ALTERED:
        sizes["mlp_bias"] = False
    model = build(model_type, torch.float32, **sizes)
    neurons, groups = torch.arange(96), torch.arange(4)
    keep = {(0, "neurons"): neurons < 64, (1, "neurons"): neurons % 2 == 0}
    if name == ALTERED:
        keep = {(1, "mlp"): torch.zeros(1, dtype=torch.bool), (2, "neurons"): neurons < 40}
    elif name not in ("gpt_neox", "lfm2"):
        keep[2, "kv-groups"] = groups < 3
    Cut(keep).apply(model)
    if name == ALTERED:
        AddBias({2: ("mlp.down_proj",)}).apply(model)
        torch.nn.init.constant_(model.model.layers[2].mlp.down_proj.bias, 0.3)
    directory = home / name.replace(", ", "-")
    model.save_pretrained(directory)
    add_modeling_file(directory, model)
    add_old_keys(directory)
    tokens_1T = random_tokens(1, 30)
    scores_TV = logits_of(model, tokens_1T)[0].log_softmax(-1)
    expected_T = scores_TV[:-1].gather(1, tokens_1T[0, 1:, None])[:, 0]
    return directory, tokens_1T[0].tolist(), expected_T


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    main()
