"""What a model answers to prompts, by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .fields import at_least
from .likelihood import context_size
from .records import Completion, Conversation
from .token_blocks import UNSCORED, encoded


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Completion | Conversation],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """Let a causal language model answer, with or without an adapter.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        asked (`Sequence[Completion or Conversation]`): Prompts, or conversations up to the assistant's last turn.
        max_new_tokens (`int`, *optional*): The longest answer; by default as many tokens as the longest that is known. An answer ends with
            the model's positions; a prompt that leaves its own answer no room is cut off at its beginning, down to half of them.
        batch_size (`int`, defaults to 16): Prompts generated from at once.
        progress (`bool`, defaults to `True`): Show a progress bar when there are more than 20 batches.

    Returns:
        `list[str]`: One for each, up to its end and without special tokens.

    Raises:
        `ValueError`: If a number is too small, or the tokenizer has no chat template for a conversation.
    """
    at_least(1, batch_size=batch_size, **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}))
    limit = context_size(model.config)
    prompts, wanted = [], []
    for record in asked:
        ids, labels = encoded(tokenizer, record)
        start = len(labels) - labels[::-1].index(UNSCORED)  # of the last target
        wanted.append(max_new_tokens or max(1, len(ids) - start))
        room = limit - min(wanted[-1], limit // 2) if limit else start
        prompts.append(ids[max(0, start - room) : start])
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad = next((token for token in (tokenizer.pad_token_id, *sorted(ends)) if token is not None), 0)
    options = {"do_sample": False, "num_beams": 1, "eos_token_id": sorted(ends) or None, "pad_token_id": pad}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    found = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(batches, desc="answering", leave=False, disable=not progress or len(batches) <= 20):
            width = len(prompts[batch[-1]])
            longest = max(wanted[index] for index in batch)
            longest = min(longest, limit - width) if limit else longest
            tokens = torch.full((len(batch), width), pad)
            mask = torch.zeros_like(tokens)
            for row, index in enumerate(batch):  # padded at the beginning: what is generated follows the prompt
                tokens[row, width - len(prompts[index]) :], mask[row, width - len(prompts[index]) :] = torch.tensor(prompts[index]), 1
            tokens, mask = tokens.to(model.device), mask.to(model.device)
            generated = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=longest, **options)[:, width:]
            for index, row_ids in zip(batch, generated.tolist(), strict=True):
                end = next((place for place, token in enumerate(row_ids) if token in ends), None)
                found[index] = tokenizer.decode(row_ids[:end], skip_special_tokens=True)
    finally:
        model.train(was_training)
    return found
