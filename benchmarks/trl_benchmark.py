# Copyright © 2026 MLX Contributors

"""Time and memory of DPO as TRL does it in PyTorch, beside SFT with the same adapters.

Needs torch, transformers and peft, and neither TRL nor MLX. A step follows TRL's: one
forward of chosen and rejected rows together, the reference by switching the adapters
off, sdpa attention, 16-bit autocast on a GPU, AdamW, gradients clipped to norm 1.

(1) SFT, (2) DPO through the logits of every position, (3) DPO with the head on answer
positions alone, in tiles, (4) the same with the reference's log-probs known.

    python benchmarks/trl_benchmark.py --shape qwen3-0.6b --prompt 768 --completion 128
"""

import argparse
import gc
import math
import sys
import time
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from dpo_report import (
    BETA,
    LEARNING_RATE,
    SHAPES,
    Way,
    add_options,
    command,
    machine,
    sizes,
    table,
)
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

NAMES = {
    "1": "(1) PyTorch SFT",
    "2": "(2) DPO, all logits",
    "3": "(3) DPO, answer logits",
    "4": "(4) as (3), reference known",
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TILE = 4096  # rows of logits at a time
CUDA = torch.cuda.is_available()


def load_policy(args):
    """A model of the shape with random weights, and what is trained of it."""
    torch.manual_seed(args.seed)
    shape = dict(SHAPES[args.shape])
    shape["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": shape["rope_theta"],
    }
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    dtype = torch.bfloat16 if CUDA else torch.float32
    with torch.device("cuda" if CUDA else "cpu"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return add_trained_part(model, args)


def add_trained_part(model, args):
    """Adapters, or unfrozen layers, where mlx-lm places them."""
    model.config.use_cache = False
    if args.grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    layers = model.config.num_hidden_layers
    first = 0 if args.num_layers < 0 else max(layers - args.num_layers, 0)
    if args.fine_tune_type == "full":
        model.requires_grad_(False)
        model.model.layers[first:].requires_grad_(True)
        return model.train()
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=20 * args.rank,
        lora_dropout=0.0,
        target_modules=LINEARS,
        layers_to_transform=list(range(first, layers)),
        layers_pattern="layers",
        use_dora=(args.fine_tune_type == "dora"),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora).train()


def causal_model(model):
    """The model with its head, out of peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def reference(model):
    """The model as it started: adapters off, nothing recomputed, no gradients."""
    was_training = model.training
    # Recomputing layers follows training mode; there is no dropout.
    model.eval()
    try:
        with model.disable_adapter(), torch.no_grad():
            yield
    finally:
        model.train(was_training)


def selected_logps(logits, targets):
    """Log-probs of the targets in float32."""
    logits = logits.float()
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def all_logits_logps(model, tokens, mask):
    """Summed log-probs of the answers, a row of logits at a time, from all logits."""
    logits = model(input_ids=tokens).logits[:, :-1]
    rows = zip(logits, tokens[:, 1:])
    return (torch.stack([selected_logps(*row) for row in rows]) * mask).sum(-1)


def answer_logits_logps(model, tokens, mask, attention=None):
    """The same with the head on answer positions alone, recomputed in tiles."""
    causal = causal_model(model)
    out = causal.model(input_ids=tokens, attention_mask=attention)
    hidden = out.last_hidden_state[:, :-1][mask]
    targets, head = tokens[:, 1:][mask], causal.lm_head

    def tile(hidden, targets):
        return selected_logps(head(hidden), targets)

    parts = zip(hidden.split(TILE), targets.split(TILE))
    logps = torch.cat([checkpoint(tile, *p, use_reentrant=False) for p in parts])
    return logps.new_zeros(mask.shape).masked_scatter(mask, logps).sum(-1)


def dpo_loss(model, batch, logps):
    """Mean sigmoid loss; the reference's log-probs are part of the batch or made."""
    tokens, mask, known = batch
    if known is None:
        with reference(model):
            known = logps(model, tokens, mask)
    chosen, rejected = (logps(model, tokens, mask) - known).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def sft_loss(model, batch, _):
    """The model's own cross-entropy over both sequences."""
    return model(input_ids=batch[0], labels=batch[0]).loss


def make_batches(model, key, prompt, completion, size, args):
    """Random rows, all chosen ones first, as TRL puts them together."""
    batches = []
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.batches or 1):
        vocab = SHAPES[args.shape]["vocab_size"]
        shape = (2 * size, prompt + completion)
        tokens = torch.randint(1, vocab, shape, generator=generator)
        tokens[size:, :prompt] = tokens[:size, :prompt]
        tokens = tokens.to(device)
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        mask[:, prompt:] = True
        mask, known = mask[:, 1:], None
        if key == "4":
            with reference(model), autocast_context():
                known = answer_logits_logps(model, tokens, mask)
        batches.append((tokens, mask, known))
    return batches


def autocast_context():
    """bfloat16 on a GPU, as TRL's default; nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext()


def synchronize():
    """Wait for the GPU."""
    if CUDA:
        torch.cuda.synchronize()


def make_optimizer(model):
    """AdamW of what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=CUDA)


def train_step(model, optimizer, loss_fn, batch, logps):
    """One step, waited for; its loss."""
    with autocast_context():
        loss = loss_fn(model, batch, logps)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronize()
    return loss


def turn(model, optimizer, key, batches, times):
    """Seconds a step over all batches, and the last loss."""
    loss_fn = sft_loss if key == "1" else dpo_loss
    logps = all_logits_logps if key == "2" else answer_logits_logps
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        for batch in batches:
            loss = train_step(model, optimizer, loss_fn, batch, logps)
    seconds = time.perf_counter() - start
    return seconds / (times * len(batches)), loss.item()


def take_turn(way, model, optimizer, key, batches, times):
    """One turn of one way, its peak kept; None if it failed."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds, way.loss = turn(model, optimizer, key, batches, times)
    except torch.OutOfMemoryError:
        way.failure = "failed: out of memory"
        optimizer.zero_grad(set_to_none=True)
        return None
    if not math.isfinite(way.loss):
        raise ValueError(f"{way.name} gives a loss of {way.loss}.")
    if CUDA:
        way.peak = max(way.peak, torch.cuda.max_memory_allocated())
    return seconds


def measure(model, prompt, completion, size, args):
    """Warm every way up, then let them take turns."""
    optimizer = make_optimizer(model)
    ways, batches = {}, {}
    for key in args.ways.split(","):
        batches[key] = make_batches(model, key, prompt, completion, size, args)
        tokens = sum(t.numel() for t, *_ in batches[key])
        ways[key] = Way(NAMES[key], tokens)
        first = take_turn(ways[key], model, optimizer, key, batches[key], 1)
        ways[key].first = (first or 0.0) * len(batches[key])
        ways[key].peak = 0.0
    for _ in range(args.rounds):
        for key, way in ways.items():
            if way.failure:
                continue
            turned = take_turn(way, model, optimizer, key, batches[key], args.steps)
            way.seconds += [] if turned is None else [turned]
    return ways


def run(arguments: list[str] | None = None) -> list[dict[str, Way]]:
    """Measure every size that was asked for; print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    args = parser.parse_args(arguments)
    if not args.shape:
        raise ValueError("Give --shape.")
    if args.fine_tune_type == "full" and args.ways != "1":
        raise ValueError("Without adapters there is no reference: use --ways 1.")
    model = load_policy(args)
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    print(machine(device, "torch", "transformers", "peft"))
    print(f"`{command(__file__, arguments)}`")
    if not CUDA:
        print("PyTorch doesn't count memory on a CPU: no peak.")
    results = []
    for prompt, completion, size in sizes(args):
        ways = measure(model, prompt, completion, size, args)
        pairs = (args.batches or 1) * size
        total = prompt + completion
        title = (
            f"{args.shape}, {prompt} + {completion} tokens, {size} pairs a step, "
            f"PyTorch"
        )
        lines = table(title, ways, [(prompt, total, total)] * pairs)
        print("\n".join(lines), flush=True)
        results.append(ways)
    return results


if __name__ == "__main__":
    try:
        run()
    except ValueError as error:
        sys.exit(f"{error}")
