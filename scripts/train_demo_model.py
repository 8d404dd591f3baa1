"""Trains the demo model that ships with adapt-pruner, tokenizer included.

Run it from the repository root, on one core:

    OMP_NUM_THREADS=1 python scripts/train_demo_model.py

The text is Python's own documentation (`adapt_pruner.data.pydocs`), so the figures depend on the
Python version. With Python 3.11.7, torch 2.13 (CPU) and transformers 5.23 the command took 24 min
43 s and reached, over consecutive windows of 256 tokens, each document starting with id 0:

    split      documents     bytes   tokens    loss   perplexity   bits per byte
    train            331   1886586   735003  2.0582        7.832          1.1569
    held-out          35    171321    68137  3.0844       21.855          1.7698

The held-out loss was lowest at the last of the 4000 steps. It also guided the choice of the batch
size, learning rate and initializer range in short trials, so it is slightly optimistic.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from adapt_pruner.data.pydocs import documents

OUTPUT = Path(__file__).resolve().parents[1] / "src" / "adapt_pruner" / "demo_model"
EOS = "<|endoftext|>"
VOCAB_SIZE = 1024
MAX_LENGTH = 512
WINDOW = 256
BATCH_SIZE = 8
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 100
DECAY_FRACTION = 0.5
EVAL_INTERVAL = 200


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer that starts every sequence with `<|endoftext|>`, id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A",
        pair=f"{EOS} $A {EOS} $B",
        special_tokens=[(EOS, tokenizer.token_to_id(EOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def create_model() -> LlamaForCausalLM:
    """Returns the untrained model."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False, repetition_penalty=1.1
    )
    return model


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Returns the token ids of all texts in one row; each text begins with id 0."""
    ids = [tokenizer(text, verbose=False).input_ids for text in texts]
    return torch.tensor([token for text_ids in ids for token in text_ids])


def sample_batch(stream: torch.Tensor) -> torch.Tensor:
    """Returns `BATCH_SIZE` windows of the stream at random positions."""
    starts = torch.randint(len(stream) - WINDOW + 1, (BATCH_SIZE, 1))
    return stream[starts + torch.arange(WINDOW)]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Returns the mean loss per token over the stream's consecutive windows."""
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = [model(batch, labels=batch).loss * len(batch) for batch in windows.split(BATCH_SIZE)]
    return float(sum(losses) / len(windows))


def learning_rate_factor(step: int, steps: int) -> float:
    """Returns the share of the peak learning rate: warmup, constant, then linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_FRACTION * steps))


def train(
    model: LlamaForCausalLM, train_stream: torch.Tensor, heldout_stream: torch.Tensor, steps: int
) -> None:
    """Trains the model in place and leaves it with the weights of the lowest held-out loss."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    scales = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": scales, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    best_loss, best_weights = math.inf, {}
    start = time.perf_counter()
    for step in range(1, steps + 1):
        batch = sample_batch(train_stream)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % EVAL_INTERVAL == 0 or step == steps:
            heldout_loss = evaluate(model, heldout_stream)
            seconds = time.perf_counter() - start
            print(
                f"step {step:5d}  batch loss {loss.item():.4f}  "
                f"held-out loss {heldout_loss:.4f}  {seconds:6.0f} s",
                flush=True,
            )
            if heldout_loss < best_loss:
                best_loss, best_weights = heldout_loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)


def report(name: str, loss: float, stream: torch.Tensor, texts: list[str]) -> None:
    """Prints the loss, the perplexity per token and the bits per byte of one split."""
    num_bytes = sum(len(text.encode()) for text in texts)
    bits_per_byte = loss / math.log(2) * len(stream) / num_bytes
    print(
        f"{name}: {len(texts)} documents, {num_bytes} bytes, {len(stream)} tokens, "
        f"loss {loss:.4f}, perplexity {math.exp(loss):.3f}, bits per byte {bits_per_byte:.4f}"
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes model and tokenizer to `output`, replacing each file only once it is complete."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        # Releases before 5 know the tokenizer by this name only, later ones by both.
        tokenizer_config = Path(directory) / "tokenizer_config.json"
        values = json.loads(tokenizer_config.read_text())
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer_config.write_text(json.dumps(values, indent=2) + "\n")
        for path in Path(directory).iterdir():
            path.chmod(0o644)
            os.replace(path, output / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    train_texts, heldout_texts = documents("train"), documents("heldout")
    tokenizer = train_tokenizer(train_texts)
    train_stream = token_stream(tokenizer, train_texts)
    heldout_stream = token_stream(tokenizer, heldout_texts)
    model = create_model()
    print(f"Python {platform.python_version()}, {model.num_parameters()} parameters")
    train(model, train_stream, heldout_stream, arguments.steps)
    report("train", evaluate(model, train_stream), train_stream, train_texts)
    report("held-out", evaluate(model, heldout_stream), heldout_stream, heldout_texts)
    save(model, tokenizer, arguments.output)


if __name__ == "__main__":
    main()
