"""What else can be done with labelled examples: a LoRA of its own, in the ordinary way, a tuned condition, a mixture of adapters."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import Trainer, TrainingArguments

from peft_icm import ICMGenerator
from peft_icm.adapters import AdapterLayout, attach, load_base
from peft_icm.adapters.examples import collate, example_losses
from peft_icm.adapters.per_sample import PerSampleLora


def train_lora(layout: AdapterLayout, base: str, examples: Any, steps: int, rate: float, start: Tensor | None = None) -> Tensor:
    """`[P]`: from scratch, or from an adapter `[P]`.

    Args:
        layout ([`AdapterLayout`]): Of the LoRA.
        base (`str`): Folder of the base.
        examples (`Dataset`): As the base takes them, with `labels`.
        steps (`int`): Of 16 examples.
        rate (`float`): Peak of the learning rate.
        start (`Tensor`, *optional*): Where to begin.
    """
    torch.manual_seed(0)
    model: Any = get_peft_model(load_base(layout, base, None), layout.lora_config())
    if start is not None:
        model = attach(model, layout, layout.unflatten(start), is_trainable=True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, max_steps=steps, per_device_train_batch_size=min(16, len(examples)), learning_rate=rate,
            lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.0, max_grad_norm=1.0, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate).train()
    return flat(layout, model)


def tune_condition(generator: ICMGenerator, base: str, vector: Tensor, examples: Any, steps: int, rate: float) -> Tensor:
    """`[P]`: what the generator gives for a normalised task vector that is all that learns, its weights and z = 0 staying as they are.

    Args:
        generator ([`ICMGenerator`]): Of a `"direct"` network.
        vector (`Tensor`): `[d]` task vector to begin with.
        base (`str`), examples (`Dataset`), steps (`int`), rate (`float`): See [`train_lora`].
    """
    model: Any = load_base(generator.layout, base, None).requires_grad_(False).eval()
    generator.requires_grad_(False)
    condition = torch.nn.Parameter(generator.normalize_condition(vector[None]).float())
    latent = torch.zeros(1, generator.config.latent_size)
    optimizer = torch.optim.AdamW([condition], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(0)
    with PerSampleLora(model, generator.layout) as lora:
        for _ in range(steps):
            batch = collate([examples[index] for index in torch.randperm(len(examples), generator=draw)[:16].tolist()])
            lora.use(generator.statistics.denormalize(generator.network.decode(latent, condition)))
            nats, tokens = example_losses(model, batch)
            optimizer.zero_grad()
            (nats.sum() / tokens.sum()).backward()
            optimizer.step()
            schedule.step()
    return generator.statistics.denormalize(generator.network.decode(latent, condition))[0].detach()


def mix(layout: AdapterLayout, base: str, examples: Any, pool: Tensor) -> Tensor:
    """`[P]`: LoraHub's mixture `sum_i c_i w_i` of adapters (arXiv 2307.13269), by its recipe: c within 1.5 of 0 and from 0, 40 draws of
    nevergrad's NGOpt at the loss of all examples + 0.05 times the mean of |c|.

    Args:
        layout ([`AdapterLayout`]): Of the adapters.
        base (`str`), examples (`Dataset`): See [`train_lora`].
        pool (`Tensor`): `[N, P]`, w.
    """
    import nevergrad

    batches = [collate([examples[i] for i in range(at, min(at + 16, len(examples)))]) for at in range(0, len(examples), 16)]
    parameters = nevergrad.p.Array(init=[0.0] * len(pool), lower=-1.5, upper=1.5)
    parameters.random_state.seed(0)
    model: Any = load_base(layout, base, None).eval()
    with PerSampleLora(model, layout) as lora, torch.no_grad():

        def loss(coefficients: Any) -> float:
            shares = torch.tensor(coefficients, dtype=pool.dtype)
            nats = tokens = 0.0
            for batch in batches:
                lora.use((shares @ pool).expand(len(batch["labels"]), -1))
                more, counted = example_losses(model, batch)
                nats, tokens = nats + float(more.sum()), tokens + float(counted.sum())
            return nats / tokens + 0.05 * float(shares.abs().mean())

        best = nevergrad.optimizers.NGOpt(parametrization=parameters, budget=40).minimize(loss)
    return torch.tensor(best.value, dtype=pool.dtype) @ pool


def flat(layout: AdapterLayout, model: PeftModel) -> Tensor:
    """The adapter of a model, `[P]`."""
    return layout.flatten(get_peft_model_state_dict(model, save_embedding_layers=False)).detach().cpu()
