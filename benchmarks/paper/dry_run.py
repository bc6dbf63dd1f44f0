"""The full-size reproduction without running it: every shape, byte and step on the meta device, and what one GPU would take for it.

Nothing is fetched and no weight is allocated. Bases, LoRAs, layouts and generators are the real classes, built on meta from the
configurations below; FLOPs and the bytes that autograd keeps are counted in one forward of a batch. Only times are estimates.
"""

from __future__ import annotations

import itertools
import json
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import Florence2Config, Florence2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from peft_icm.adapters.layout import AdapterLayout
from peft_icm.generator.configuration_icm import ICMConfig
from peft_icm.generator.modeling_icm import ICMGenerator
from peft_icm.training.arguments import ICMTrainingArguments
from peft_icm.training.episodes import held_out_mask

from .scales import PAPER_DETECTION, PAPER_TEXT, SCALES, TABLE_RANK
from .workshop import GENERATOR_BATCH

LLAMA, FLORENCE = "llama-3-8b", "florence-2-base"
VOCABULARY = {LLAMA: 128_256, FLORENCE: 51_328}  # the native Florence-2 checkpoints pad 51,289 to a multiple of 64
PAPER_VOCABULARY = 51_289
PAPER = SCALES["paper"]
FAMILIES = {LLAMA: PAPER_TEXT, FLORENCE: PAPER_DETECTION}
COCO_IMAGES = {"dog": 4385, "bicycle": 3252, "cat": 4114, "sofa": 4423, "motorbike": 3502}  # of train2017 that show the class
CONDITION_DIM, LATENT_SIZE = 768, 256  # d of CLIP ViT-L/14, k of the published code
IMAGE_SIZE, PROMPT_TOKENS = 768, 13  # Florence-2's processor: pixels of a side; "<OD>" as the sentence it stands for

# One A800-class GPU, and what is assumed of it.
MEMORY, PEAK, BANDWIDTH = 80 * 10**9, 312e12, 2.0e12  # bytes, dense bf16 FLOP/s, bytes/s
TRANSFORMER, CONVOLUTION = 0.35, 0.10  # model-FLOPs utilisation
STEP_SECONDS = 0.02  # Trainer, data and launches of one step
LORA_STATE = 16  # bytes a parameter: fp32 weight, gradient and Adam's two moments
ADAM_TRAFFIC = 28  # bytes a parameter: weight, gradient and moments read, weight and moments written
ACTIVATION_PASSES = 5  # written, read by the next layer, read in backward, its gradient written and read


@dataclass(frozen=True)
class DryRunSettings:
    """How large the reproduction is; the defaults are the paper's, where it gives a number.

    Args:
        epochs (`int`, defaults to 150): Epochs of each LoRA (the paper's).
        snapshots (`int`, defaults to 50): K: the LoRA of each of the last K epochs is kept (the paper's).
        lora_batch_size (`int`, defaults to 8): Examples of a step of a LoRA.
        block_size (`int`, defaults to 1024): Tokens of a block of text.
        blocks_per_epoch (`int`, defaults to 256): Blocks of an epoch of a Pile subset. An assumption: the paper does not give it.
        answer_tokens (`int`, defaults to 64): Tokens of Florence-2's answer, padded. An assumption.
        generator_epochs (`int`, defaults to 2000): Epochs of each generator (the paper's).
        generator_batch_size (`int`, defaults to 40): Snapshots of a step of a generator.
        seeds (`int`, defaults to 3): Generators of each kind, of Table 5 one; the LoRAs are trained once.
        ranks (`tuple[int, ...]`, defaults to `(1, 2, 4, 8)`): r of Tables 4 and 5.
        conv_layers (`tuple[int, ...]`, defaults to `(10, 11, 12, 13, 14, 20)`): n of Table 5.

    Raises:
        `ValueError`: If a number is not positive, or there are more snapshots than epochs.

    Example:

    ```python
    >>> DryRunSettings().snapshots
    50

    ```
    """

    epochs: int = PAPER_TEXT.recipe["num_train_epochs"]
    snapshots: int = PAPER_TEXT.snapshots
    lora_batch_size: int = 8
    block_size: int = PAPER_TEXT.recipe["dataset_kwargs"]["block_size"]
    blocks_per_epoch: int = PAPER_TEXT.recipe["dataset_kwargs"]["blocks_per_epoch"]
    answer_tokens: int = 64
    generator_epochs: int = PAPER_TEXT.epochs
    generator_batch_size: int = GENERATOR_BATCH
    seeds: int = len(PAPER.seeds)
    ranks: tuple[int, ...] = PAPER_DETECTION.ranks
    conv_layers: tuple[int, ...] = PAPER.conv_layers

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in asdict(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or min(numbers) < 1:
                raise ValueError(f"{name}={value} must be at least 1: give a positive number.")
        if self.snapshots > self.epochs:
            raise ValueError(
                f"snapshots={self.snapshots} must be between 1 and epochs={self.epochs}: keep fewer snapshots or train for more epochs."
            )


# ---------------------------------------------------------------------- the real classes, on meta
def meta_lora(base: str, rank: int, vocabulary: int | None = None) -> PeftModel:
    """A base of the paper in bf16 with its LoRA in fp32, on the meta device.

    Args:
        base (`str`): `"llama-3-8b"` or `"florence-2-base"`.
        rank (`int`): r.
        vocabulary (`int`, *optional*): Size of the vocabulary; by default the native checkpoint's.

    Returns:
        `PeftModel`: Without a single allocated weight.

    Raises:
        `ValueError`: If the base is not one of the two.

    Example:

    ```python
    >>> AdapterLayout.from_peft_model(meta_lora("florence-2-base", 1)).numel
    241280

    ```
    """
    model = meta_base(base, vocabulary)
    lora = LoraConfig(r=rank, target_modules=list(FAMILIES[base].lora["target_modules"]), task_type="CAUSAL_LM" if base == LLAMA else None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about merging a LoRA on the tied lm_head: nothing is merged here
        wrapped = get_peft_model(model, lora, low_cpu_mem_usage=True)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def meta_base(base: str, vocabulary: int | None = None) -> Any:
    """A base of the paper in bf16, on the meta device: see [`meta_lora`]."""
    if base not in FAMILIES:
        raise ValueError(f"base={base!r} is unknown: choose one of {', '.join(FAMILIES)}.")
    words = vocabulary or VOCABULARY[base]
    with torch.device("meta"):
        return (_llama(words) if base == LLAMA else _florence(words)).to(torch.bfloat16)


def _llama(vocabulary: int) -> nn.Module:
    heads: dict[str, Any] = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192, "vocab_size": vocabulary}
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, rope_parameters=rope))


def _florence(vocabulary: int) -> nn.Module:
    half = {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}
    text = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in half.items()}
    text |= {"d_model": 768, "vocab_size": vocabulary, "max_position_embeddings": 1024}
    vision = {"embed_dim": [128, 256, 512, 1024], "num_heads": [4, 8, 16, 32], "num_groups": [4, 8, 16, 32], "depths": [1, 1, 9, 1]}
    config = Florence2Config(text_config={"model_type": "bart", **text}, vision_config={**vision, "projection_dim": 768})
    return Florence2ForConditionalGeneration(config)


class Work(NamedTuple):
    """What one forward of a batch takes; the gradient of the largest tensor comes on top of what autograd keeps."""

    flops: int  # of matrix products and convolutions
    saved: int  # bytes that autograd keeps for the backward pass, weights excluded
    largest: int  # bytes of the largest tensor of these


def _measure(model: nn.Module, forward: Callable[[], Tensor], skip: Callable[[torch.Size], bool] | None = None) -> tuple[Tensor, Work]:
    """Run a forward on meta, and count; tensors of a shape that `skip` says are not kept."""
    own = {part.untyped_storage()._cdata for part in itertools.chain(model.parameters(), model.buffers())}
    saved: dict[int, Any] = {}  # by storage, held so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and not (skip and skip(tensor.shape)):
            saved[storage._cdata] = storage
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(pack, lambda tensor: tensor), torch.device("meta"):
        output = forward()
    sizes = [storage.nbytes() for storage in saved.values()]
    return output, Work(int(counter.get_total_flops()), sum(sizes), max(sizes, default=0))


def _lora_forward(base: str, model: PeftModel, settings: DryRunSettings) -> tuple[Tensor, Work]:
    """One training batch: logits, and what they take. Masks are given in full: transformers reads the values of others."""
    batch, inner, block = settings.lora_batch_size, model.get_base_model(), settings.block_size

    def attention(shape: torch.Size) -> bool:
        # On meta attention takes its plain form, on a GPU the fused one, which keeps no matrix for each head.
        return shape[-2:] == (block, block) and shape[:-2].numel() > batch

    def text() -> Tensor:
        ids, mask = torch.zeros(batch, block, dtype=torch.long), torch.ones(batch, 1, block, block, dtype=torch.bool)
        return model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).logits

    def detection() -> Tensor:
        # The model puts image tokens in their places by value, and meta has none: image and prompt are joined here.
        core: Any = inner.model
        length = settings.answer_tokens
        pixels = torch.zeros(batch, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bfloat16)
        prompt = core.get_input_embeddings()(torch.zeros(batch, PROMPT_TOKENS, dtype=torch.long))
        joined = torch.cat([core.get_image_features(pixels).pooler_output, prompt], dim=1)
        states = BaseModelOutput(last_hidden_state=core.language_model.encoder(inputs_embeds=joined)[0])
        labels, mask = torch.zeros(batch, length, dtype=torch.long), torch.ones(batch, 1, length, length, dtype=torch.bool)
        return model(encoder_outputs=states, labels=labels, decoder_attention_mask=mask, use_cache=False).logits

    return _measure(model, text, attention) if base == LLAMA else _measure(model, detection)


# ---------------------------------------------------------------------- the parts of the result
def _lora_part(base: str, rank: int, settings: DryRunSettings) -> tuple[dict[str, Any], AdapterLayout]:
    """Layout, steps, time and memory of the five LoRAs of one base and rank."""
    model = meta_lora(base, rank)
    layout = AdapterLayout.from_peft_model(model)
    logits, work = _lora_forward(base, model, settings)
    size, frozen = layout.numel, sum(part.numel() for part in model.parameters()) - layout.numel
    examples = dict.fromkeys(PAPER_TEXT.tasks, settings.blocks_per_epoch) if base == LLAMA else COCO_IMAGES
    # Frozen weights have no gradient: a step is the forward and as much again for the gradients of the activations.
    flops_each = 2 * work.flops / settings.lora_batch_size
    tasks = {}
    for task, count in examples.items():
        steps = settings.epochs * -(-count // settings.lora_batch_size)
        flops = settings.epochs * count * flops_each
        hours = (flops / (TRANSFORMER * PEAK) + steps * STEP_SECONDS) / 3600
        tasks[task] = {"examples_per_epoch": count, "steps": steps, "flops": flops, "hours": hours}
        if base == LLAMA:  # the usual formula, beside what was counted
            tokens = settings.epochs * count * settings.block_size
            tasks[task] |= {"tokens": tokens, "flops_4n": 4 * frozen * tokens}
    memory = {"weights": 2 * frozen, "lora_and_adam": LORA_STATE * size, "activations": work.saved, "largest_gradient": work.largest}
    part: dict[str, Any] = {"base": base, "rank": rank, "vocabulary": VOCABULARY[base], "base_parameters": frozen, "P": size}
    part |= {"tensors": len(layout.keys), "dtype": layout.dtype, "adapter_bytes": layout.num_bytes, "logits": list(logits.shape)}
    part |= {"flops_per_example": flops_each, "tasks": tasks, "hours": sum(task["hours"] for task in tasks.values())}
    part |= {"memory_bytes": memory, "peak_bytes": sum(memory.values()), "collection_shape": [len(tasks), settings.snapshots, size]}
    return part | {"collection_bytes": len(tasks) * settings.snapshots * layout.num_bytes}, layout


def _meta_generator(layout: AdapterLayout, architecture: str, num_conv_layers: int) -> ICMGenerator:
    """A generator of five tasks on the meta device."""
    tasks = [{"name": task, "description": task} for task in PAPER_TEXT.tasks]
    sizes: dict[str, Any] = {"condition_dim": CONDITION_DIM, "latent_size": LATENT_SIZE, "num_conv_layers": num_conv_layers}
    config = ICMConfig(architecture=architecture, layout=layout.to_dict(), tasks=tasks, **sizes)
    with torch.device("meta"):
        return ICMGenerator(config)


def _generator_part(
    lora: dict[str, Any], layout: AdapterLayout, architecture: str, layers: int, settings: DryRunSettings
) -> dict[str, Any]:
    """Shapes, steps, time and memory of one generator."""
    generator, batch, size = _meta_generator(layout, architecture, layers), settings.generator_batch_size, layout.numel
    output, work = _measure(generator, lambda: generator(torch.zeros(batch, size), torch.zeros(batch, CONDITION_DIM)).reconstruction)
    if tuple(output.shape) != (batch, size):
        raise RuntimeError(f"The {architecture} network of {layers} layers returned {tuple(output.shape)}, not {(batch, size)}.")
    parameters, trained = generator.num_parameters(), generator.num_parameters(only_trainable=True)
    kept = settings.snapshots - int(held_out_mask(settings.snapshots, ICMTrainingArguments.held_out).sum())
    steps = settings.generator_epochs * -(-lora["collection_shape"][0] * kept // batch)
    compute = 3 * work.flops / (CONVOLUTION * PEAK)
    traffic = (ACTIVATION_PASSES * work.saved + ADAM_TRAFFIC * trained) / BANDWIDTH
    weights = LORA_STATE * trained + 4 * (parameters - trained)
    memory = {"weights_and_adam": weights, "activations": work.saved, "largest_gradient": work.largest}
    part = {"base": lora["base"], "rank": lora["rank"], "architecture": architecture}
    part |= {"num_conv_layers": layers if architecture == "paper" else None, "parameters": parameters, "bytes": 4 * parameters}
    part |= {"input": [batch, size], "output": list(output.shape), "steps": steps, "flops_per_step": 3 * work.flops}
    part |= {"bound": "compute" if compute > traffic else "bandwidth", "hours": steps * (max(compute, traffic) + STEP_SECONDS) / 3600}
    return part | {"memory_bytes": memory, "peak_bytes": sum(memory.values())}


def _assumptions(settings: DryRunSettings) -> list[str]:
    return [
        f"One A800-class GPU: {MEMORY / 1e9:.0f} GB, {PEAK / 1e12:.0f} TFLOP/s dense bf16, {BANDWIDTH / 1e12} TB/s.",
        f"LoRAs reach {TRANSFORMER} of the peak (model-FLOPs utilisation).",
        "A LoRA step is 2 forwards: the forward, counted on meta, and as much for the gradients of the activations; the frozen base has"
        " no weight gradients. That is about 4 N a token; full training would be 6 N.",
        f"Generators (fp32, TF32 convolutions) take the longer of 3 forwards at {CONVOLUTION} of the peak and of {ACTIVATION_PASSES} passes"
        f" over what autograd keeps and {ADAM_TRAFFIC} bytes a trained parameter at full bandwidth.",
        f"Each step has {STEP_SECONDS} s of Trainer, data and launches.",
        "Base in bf16; LoRA, its gradient and Adam's moments in fp32; no gradient checkpointing. Activations are what autograd keeps on"
        " meta, in Llama without attention matrices (fused attention keeps none), in Florence-2 with them: an upper bound.",
        f"A Pile subset has {settings.blocks_per_epoch} blocks of {settings.block_size} tokens an epoch"
        f" ({settings.blocks_per_epoch * settings.block_size:,} tokens): the paper does not give it.",
        f"Florence-2 reads {IMAGE_SIZE}^2 pixels and {PROMPT_TOKENS} tokens; an answer has {settings.answer_tokens}, padding included.",
        "Tables count the paper's network, once for each seed (Table 5: one), and LoRAs once. Not counted: evaluation, COND P-DIFF,"
        " task vectors, reading of images.",
    ]


def _downloads(loras: dict[tuple[str, int], dict[str, Any]], settings: DryRunSettings) -> list[dict[str, Any]]:
    """What is fetched, in bytes; the bases' are derived from their parameters."""
    llama, florence = (next(part["base_parameters"] for (base, _), part in loras.items() if base == name) for name in (LLAMA, FLORENCE))
    pile = 4 * len(PAPER_TEXT.tasks) * settings.blocks_per_epoch * settings.block_size
    return [
        {"id": "meta-llama/Meta-Llama-3-8B", "bytes": 2 * llama, "note": "gated; bf16"},
        {"id": "florence-community/Florence-2-base", "bytes": 4 * florence, "note": "at most: fp32"},
        {"id": "open_clip ViT-L-14, pretrained openai", "bytes": 1_710_000_000, "note": "task vectors; about"},
        {"id": "COCO train2017, val2017 and annotations", "bytes": 20_400_000_000, "note": "images.cocodataset.org; about"},
        {"id": "five subsets of the Pile", "bytes": pile, "note": "what is trained on, at 4 bytes a token; streamed"},
    ]


def dry_run(settings: DryRunSettings | None = None) -> dict[str, Any]:
    """Every shape, byte count and step of the full-size reproduction, with an estimate of time and memory on one GPU.

    Args:
        settings ([`DryRunSettings`], *optional*): The paper's where not given.

    Returns:
        `dict`: JSON-able. `loras`: each base and rank; `generators`: each network; `tables`: for each the hours alone, and those that it
        adds to the tables before it; `totals`, `downloads` (bytes), `assumptions`, `vocabulary_check` (P at r = 1).

    Raises:
        `RuntimeError`: If a network returns another shape than it was given.

    Example:

    ```python
    >>> result = dry_run(DryRunSettings(ranks=(2,), conv_layers=(12,), lora_batch_size=1))
    >>> [part["P"] for part in result["loras"]]
    [851968, 482560]

    ```
    """
    settings = settings or DryRunSettings()
    loras: dict[tuple[str, int], dict[str, Any]] = {}
    generators: dict[tuple[str, int, str, int], dict[str, Any]] = {}
    ranks = sorted({TABLE_RANK, *settings.ranks})
    for base, rank in [(LLAMA, TABLE_RANK), *((FLORENCE, rank) for rank in ranks)]:
        loras[base, rank], layout = _lora_part(base, rank, settings)
        numbers = sorted({12, *settings.conv_layers}) if base == FLORENCE and rank in settings.ranks else [12]
        for architecture, number in [("principal", 12), *(("paper", number) for number in numbers)]:
            generators[base, rank, architecture, number] = _generator_part(loras[base, rank], layout, architecture, number, settings)

    table_lora, ranked = [(FLORENCE, TABLE_RANK)], [(FLORENCE, rank) for rank in settings.ranks]
    # LoRAs, and convolutions of the generators on each of them
    needs: dict[str, tuple[Any, tuple[int, ...]]] = {"1": (table_lora, (12,)), "2": ([(LLAMA, TABLE_RANK)], (12,)), "4": (ranked, (12,))}
    needs |= {"5": (ranked, settings.conv_layers), "6": (table_lora, (12,))}
    tables: dict[str, dict[str, Any]] = {}
    paid: set[tuple[Any, ...]] = set()  # by the tables before
    for table, (trained, layers) in needs.items():
        networks = [(*key, "paper", number) for key in trained for number in layers]
        hours: dict[tuple[Any, ...], float] = {key: loras[key]["hours"] for key in trained}
        spent = sum(hours.values())
        seeds = 1 if table == "5" else settings.seeds
        hours |= {key: seeds * generators[key]["hours"] for key in networks}
        row = {"lora_hours": spent, "generator_hours": sum(hours.values()) - spent, "hours": sum(hours.values())}
        row |= {"added_hours": sum(cost for key, cost in hours.items() if key not in paid), "generators": len(networks) * seeds}
        row["collection_bytes"] = sum(loras[key]["collection_bytes"] for key in trained)
        row["peak_bytes"] = max([loras[key]["peak_bytes"] for key in trained] + [generators[key]["peak_bytes"] for key in networks])
        tables[table] = row
        paid |= hours.keys()
    downloads, peak = _downloads(loras, settings), max(row["peak_bytes"] for row in tables.values())
    # What the paper's "approximately 3 hours" an experiment would leave for the text of one subset.
    three_hours = int(3 / loras[LLAMA, TABLE_RANK]["hours"] * settings.blocks_per_epoch * settings.block_size)
    words = (PAPER_VOCABULARY, VOCABULARY[FLORENCE])
    check = {str(size): AdapterLayout.from_peft_model(meta_lora(FLORENCE, 1, size)).numel for size in words}
    totals: dict[str, Any] = {"hours": sum(row["added_hours"] for row in tables.values()), "peak_bytes": peak, "fits": peak <= MEMORY}
    totals["collection_bytes"] = sum(part["collection_bytes"] for part in loras.values())
    totals |= {"download_bytes": sum(entry["bytes"] for entry in downloads), "pile_tokens_per_epoch_in_3_hours": three_hours}
    result = {"settings": json.loads(json.dumps(asdict(settings))), "assumptions": _assumptions(settings), "vocabulary_check": check}
    result |= {"loras": list(loras.values()), "generators": list(generators.values()), "tables": tables}
    return result | {"downloads": downloads, "totals": totals}


def _row(cells: list[str]) -> str:
    return f"{cells[0]:<36}" + "".join(f"{cell:>14}" for cell in cells[1:])


def dry_run_table(result: dict[str, Any]) -> str:
    """The result of [`dry_run`] as text.

    Args:
        result (`dict`): What [`dry_run`] returned.

    Returns:
        `str`: Lines of at most 140 characters; GB are 10^9 bytes.
    """
    lines = [_row(["LoRAs of 5 tasks", "P", "steps", "PFLOP", "hours", "GPU GB", "snapshots GB"])]
    for part in result["loras"]:
        steps, flops = (sum(task[name] for task in part["tasks"].values()) for name in ("steps", "flops"))
        sizes = [f"{part[name] / 1e9:.2f}" for name in ("peak_bytes", "collection_bytes")]
        name = f"{part['base']} r={part['rank']}"
        lines.append(_row([name, f"{part['P']:,}", f"{steps:,}", f"{flops / 1e15:,.0f}", f"{part['hours']:.1f}", *sizes]))
    lines += ["", _row(["generators, one seed", "parameters", "MB", "steps", "TFLOP a step", "hours", "GPU GB"])]
    for part in result["generators"]:
        name = f"{part['base']} r={part['rank']} {part['architecture']} {part['num_conv_layers'] or ''}"
        sizes = [f"{part['parameters']:,}", f"{part['bytes'] / 1e6:.1f}", f"{part['steps']:,}", f"{part['flops_per_step'] / 1e12:.3f}"]
        lines.append(_row([name, *sizes, f"{part['hours']:.2f}", f"{part['peak_bytes'] / 1e9:.2f}"]))
    lines += ["", _row(["table", "LoRA hours", "generator", "alone", "added", "snapshots GB", "GPU GB"])]
    for name, part in result["tables"].items():
        spent = [f"{part[key]:.1f}" for key in ("lora_hours", "generator_hours", "hours", "added_hours")]
        lines.append(_row([name, *spent, *(f"{part[key] / 1e9:.2f}" for key in ("collection_bytes", "peak_bytes"))]))
    totals = result["totals"]
    fits = "fits" if totals["fits"] else "does NOT fit: lower lora_batch_size or generator_batch_size"
    lines += ["", "fetched:", *(f"  {entry['bytes'] / 1e9:>7.2f} GB  {entry['id']} ({entry['note']})" for entry in result["downloads"])]
    lines += [
        f"\nin total {totals['hours']:.0f} GPU hours, {totals['collection_bytes'] / 1e9:.2f} GB of snapshots, "
        f"{totals['download_bytes'] / 1e9:.1f} GB fetched, at most {totals['peak_bytes'] / 1e9:.1f} GB on the GPU: {fits}.",
        f"Three hours for Table 2's LoRAs would leave {totals['pile_tokens_per_epoch_in_3_hours']:,} tokens an epoch.\n\nassumed:",
        *(textwrap.fill(line, 138, initial_indent="- ", subsequent_indent="  ") for line in result["assumptions"]),
    ]
    return "\n".join(lines)
