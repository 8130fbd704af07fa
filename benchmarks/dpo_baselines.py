# Copyright © 2026 MLX Contributors

"""What ``dpo_benchmark.py`` compares with: SFT, textbook DPO and mlx-lm-lora."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, ContextManager

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from dpo_report import BETA, LEARNING_RATE

from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint, iterate_batches


@dataclass
class Runner:
    """How a way runs: its step, its batches, and what it keeps between steps."""

    step: Callable[[Any], tuple[mx.array, Any]]  # the loss, and what to evaluate
    batches: list[tuple[Any, int]]  # each with its tokens, padding included
    held: list[Any]
    scope: Callable[[], ContextManager]
    cache_limit: int = 0  # bytes that stay cached between steps; mlx-lm's own: none


@contextmanager
def upstream_checkpoint(model, enabled):
    """Upstream's checkpointing, which changes the layers' class, undone at the end."""
    cls = type(model.layers[0])
    own = vars(cls).get("__call__")
    if enabled:
        grad_checkpoint(model.layers[0])
    try:
        yield
    finally:
        if own is not None:
            cls.__call__ = own
        elif "__call__" in vars(cls):
            del cls.__call__


def sft(model, pairs, size, args):
    """Way 1: upstream's loss, batches and kind of step, 2B sequences a batch."""
    sequences = []
    for prompt, chosen, rejected, _ in pairs:
        sequences += [(np.concatenate([prompt, x]), 0) for x in (chosen, rejected)]
    batches = [
        ((tokens, lengths), tokens[:, 1:].size)
        for tokens, lengths in iterate_batches(sequences, 2 * size, args.max_length)
    ]
    optimizer = optim.Adam(learning_rate=LEARNING_RATE)
    optimizer.init(model.trainable_parameters())
    loss_and_gradient = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens, lengths):
        (loss, count), gradient = loss_and_gradient(model, tokens, lengths)
        optimizer.update(model, gradient)
        return loss, count

    def run(batch):
        loss, count = step(*batch)
        return loss, (state, count)

    scope = partial(upstream_checkpoint, model, args.grad_checkpoint)
    return Runner(run, batches, [optimizer.state], scope)


def answer_logps(model, tokens, lengths):
    """Summed log-probs of the answers, through the logits of every position."""
    logits = model(tokens[:, :-1]).astype(mx.float32)
    logps = nn.log_softmax(logits, axis=-1)
    logps = mx.take_along_axis(logps, tokens[:, 1:, None], axis=-1).squeeze(-1)
    place = mx.arange(1, tokens.shape[1])
    return (logps * ((place >= lengths[:, :1]) & (place < lengths[:, 1:]))).sum(-1)


def pad_rows(rows, max_length):
    """Rows of (prompt, answer) padded to one more than a multiple of 32."""
    lengths = [(len(p), len(p) + len(a)) for p, a in rows]
    width = min(1 + 32 * -(-max(n for _, n in lengths) // 32), max_length)
    tokens = np.zeros((len(rows), width), np.int32)
    for row, (prompt, answer), (start, end) in zip(tokens, rows, lengths):
        row[:start], row[start:end] = prompt, answer
    return mx.array(tokens), mx.array(lengths)


def textbook(model, pairs, size, args):
    """Way 2: policy and reference, chosen and rejected, each in its own forward."""
    order = sorted(range(len(pairs)), key=pairs.itemlen)
    batches = []
    for i in range(0, len(order), size):
        some = [pairs[j] for j in order[i : i + size]]
        chosen = pad_rows([(p, c) for p, c, *_ in some], args.max_length)
        rejected = pad_rows([(p, r) for p, _, r, _ in some], args.max_length)
        count = chosen[0][:, 1:].size + rejected[0][:, 1:].size
        batches.append(((*chosen, *rejected), count))
    reference = FrozenStart(model)
    optimizer = optim.Adam(learning_rate=LEARNING_RATE)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]

    def loss_fn(model, chosen, chosen_lengths, rejected, rejected_lengths, margin):
        policy_chosen = answer_logps(model, chosen, chosen_lengths)
        policy_rejected = answer_logps(model, rejected, rejected_lengths)
        return -nn.log_sigmoid(BETA * (policy_chosen - policy_rejected - margin)).mean()

    @partial(mx.compile, inputs=[*state, reference.state], outputs=state)
    def step(chosen, chosen_lengths, rejected, rejected_lengths):
        batch = chosen, chosen_lengths, rejected, rejected_lengths
        margin = answer_logps(reference, chosen, chosen_lengths)
        margin = margin - answer_logps(reference, rejected, rejected_lengths)
        margin = mx.stop_gradient(margin)
        loss, gradient = nn.value_and_grad(model, loss_fn)(model, *batch, margin)
        optimizer.update(model, gradient)
        return loss

    held = [optimizer.state, reference.state]
    scope = partial(upstream_checkpoint, model, args.grad_checkpoint)
    return Runner(lambda batch: (step(*batch), state), batches, held, scope)


def mlx_lm_lora(model, reference, pairs, size, args):
    """
    mlx-lm-lora's own loss, scores and batches, with a second model as the reference.

    Optional: ``pip install mlx-lm-lora --no-deps``. Its ``train_dpo`` begins with a
    limit that only Metal has and can't be stopped between steps, so its parts are put
    together here as it does.
    """
    from mlx_lm_lora.trainer import dpo_trainer as peer

    rows = [
        {
            "chosen": np.concatenate([prompt, chosen]),
            "rejected": np.concatenate([prompt, rejected]),
            "chosen_prompt_length": len(prompt),
            "rejected_prompt_length": len(prompt),
        }
        for prompt, chosen, rejected, _ in pairs
    ]
    batches = [
        (batch, 2 * batch[0][:, 1:].size)
        for batch in peer.iterate_dpo_batches(rows, size, args.max_length)
    ]
    optimizer = optim.Adam(learning_rate=LEARNING_RATE)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]

    def loss_fn(chosen, rejected, chosen_masks, rejected_masks):
        sides = [(chosen, chosen_masks), (rejected, rejected_masks)]
        policy = [peer.get_token_scores(model, *side) for side in sides]
        start = [mx.stop_gradient(peer.get_token_scores(reference, *s)) for s in sides]
        masks = [mask for _, mask in sides] * 2
        scores = [
            peer.compute_score(x, mask, "sigmoid")
            for x, mask in zip(policy + start, masks)
        ]
        return peer.dpo_loss(*scores, chosen_masks, rejected_masks, BETA, 0.0)

    value_and_grad = nn.value_and_grad(model, loss_fn)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch):
        (loss, *rest), gradient = value_and_grad(*batch)
        optimizer.update(model, gradient)
        return loss, rest

    def run(batch):
        loss, rest = step(batch)
        return loss, (state, rest)

    scope = partial(upstream_checkpoint, model, args.grad_checkpoint)
    return Runner(run, batches, [optimizer.state, reference.state], scope)
