"""The three sizes of the reproduction: which bases, tasks, ranks and recipes; one code runs them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_icm.bundled import bundled_folder

FLORENCE_TARGETS = ("q_proj", "o_proj", "k_proj", "v_proj", "linear", "Conv2d", "lm_head", "fc2")  # the paper's
TEXT_TASKS = ("latex", "austen", "debian_handbook", "wikipedia", "shakespeare")  # for ArXiv, Books, Ubuntu, Wikipedia, Gutenberg
DETECTION_TASKS = ("dog", "bicycle", "cat", "sofa", "motorbike")
TABLE_RANK = 2  # of Tables 1, 2 and 6


@dataclass(frozen=True)
class Family:
    """One base model with its tasks, the recipe of their LoRAs and of the generators that are trained on them.

    Args:
        name (`str`): `"text"` or `"detection"`; also the folder of its data.
        base (`str`): `"bundled:NAME"`, a folder below the data folder as `"data:NAME"`, or a Hub id.
        tasks (`tuple[str, ...]`): Names, in the order of the paper's columns.
        lora (`dict`): For `peft.LoraConfig`, all but the rank.
        recipe (`dict`): For [`CollectingArguments`].
        items (`str`): Which of `dataset_kwargs` counts the items of an epoch.
        snapshots (`int`): K.
        ranks (`tuple[int, ...]`): Of Table 4.
        generator (`dict`): For [`ICMConfig`].
        epochs (`int`): Of a generator.
        diffusion (`dict`): For [`train_cond_p_diff`]: steps of its two stages.
        encoder (`str`): `"bundled"` or the name of an open_clip model with the weights `openai`.
        dtype (`str`, defaults to `"float32"`): Of the base.
        pictures (`int`, defaults to 64): Objects of each class that a generator learns to read.
        test_items (`int`, *optional*): At most so many test images with the class, and as many without; at most so many test texts.
    """

    name: str
    base: str
    tasks: tuple[str, ...]
    lora: Mapping[str, Any]
    recipe: Mapping[str, Any]
    items: str
    snapshots: int
    ranks: tuple[int, ...]
    generator: Mapping[str, Any]
    epochs: int
    diffusion: Mapping[str, Any]
    encoder: str = "bundled"
    dtype: str = "float32"
    pictures: int = 64
    test_items: int | None = None

    def base_path(self, data: Path) -> str:
        """Folder or Hub id of the base.

        Raises:
            `ValueError`: If it is to lie in the data folder and does not.
        """
        kind, _, name = self.base.partition(":")
        if kind == "bundled":
            return str(bundled_folder(name) / "generator" / "base_model")
        if kind == "data":
            if not (data / name / "config.json").is_file():
                raise ValueError(f"{data / name} holds no base model: run python examples/reproduction_data.py text {name} --data {data}")
            return str(data / name)
        return self.base


@dataclass(frozen=True)
class Scale:
    """A size of the reproduction.

    Args:
        name (`str`): `"demo"`, `"small"` or `"paper"`.
        families (`tuple[Family, ...]`): What it runs on.
        conv_layers (`tuple[int, ...]`): n of Table 5.
        conv_ranks (`tuple[int, ...]`): r of Table 5.
        conv_epochs (`int`): Epochs of the generators of Table 5; the paper's architecture is slow.
        seeds (`tuple[int, ...]`): Of the generators, and of z.
        searches (`bool`, defaults to `True`): Whether greedy soups and the LoRA of all tasks, which cost many runs of the base, take part.
    """

    name: str
    families: tuple[Family, ...]
    conv_layers: tuple[int, ...] = ()
    conv_ranks: tuple[int, ...] = ()
    conv_epochs: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    searches: bool = True

    def family(self, name: str) -> Family | None:
        """The family of that name, if the scale has one."""
        return next((family for family in self.families if family.name == name), None)

    def with_ranks(self, ranks: tuple[int, ...]) -> Scale:
        """The same scale on other ranks for Table 4."""
        return replace(self, families=tuple(replace(family, ranks=ranks) for family in self.families))


PRINCIPAL = {"num_components": 32, "latent_size": 32, "kl_weight": 0.01}
PAPER = {"architecture": "paper", "latent_size": 256, "kl_weight": 0.005}

# rsLoRA with alpha = 8: s = 8 / sqrt(r), so that one learning rate serves r = 1 to 8. r = 1 (text) and r = 4 (detection) are the bundles'.
DEMO_TEXT = Family(
    name="text",
    base="bundled:text",
    tasks=TEXT_TASKS,
    lora={"lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    recipe={
        "num_train_epochs": 16,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 8,
        "dataset_kwargs": {"block_size": 256, "blocks_per_epoch": 120},
    },
    items="blocks_per_epoch",
    snapshots=8,
    ranks=(1, 2, 4, 8),
    generator=PRINCIPAL,
    epochs=400,
    diffusion={"steps": 200, "diffusion_steps": 600},
)
DEMO_DETECTION = Family(
    name="detection",
    base="bundled:detection",
    tasks=DETECTION_TASKS,
    lora={"lora_alpha": 8, "use_rslora": True, "target_modules": list(FLORENCE_TARGETS), "task_type": None},
    recipe={
        "num_train_epochs": 20,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 16,
        "dataset_kwargs": {"location_step": 20, "negatives": 2.0, "images_per_epoch": 320, "in_memory": True},
    },
    items="images_per_epoch",
    snapshots=8,
    ranks=(1, 2, 4, 8),
    generator=PRINCIPAL,
    epochs=400,
    diffusion={"steps": 200, "diffusion_steps": 600},
    test_items=120,
)
SMALL_TEXT = replace(
    DEMO_TEXT,
    base="data:smollm2",
    lora={"lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    recipe={
        "num_train_epochs": 12,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 2,
        "dataset_kwargs": {"block_size": 256, "blocks_per_epoch": 12},
    },
    snapshots=6,
    ranks=(TABLE_RANK,),
    epochs=400,
    diffusion={"steps": 200, "diffusion_steps": 600},
    test_items=2,
)
PAPER_TEXT = Family(
    name="text",
    base="meta-llama/Meta-Llama-3-8B",
    tasks=("arxiv", "books", "ubuntu", "wikipedia", "gutenberg"),
    lora={"lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    recipe={
        "num_train_epochs": 150,
        "learning_rate": 1e-4,
        "dtype": "bfloat16",
        "dataset_kwargs": {"block_size": 1024, "blocks_per_epoch": 256},  # the paper does not say how long an epoch is
    },
    items="blocks_per_epoch",
    snapshots=50,
    ranks=(TABLE_RANK,),  # Table 2 alone
    generator=PAPER,
    epochs=2000,
    diffusion={"steps": 12_000, "diffusion_steps": 12_000},
    encoder="ViT-L-14",
    dtype="bfloat16",
)
PAPER_DETECTION = replace(
    PAPER_TEXT,
    name="detection",
    base="florence-community/Florence-2-base",
    tasks=DETECTION_TASKS,
    lora={"lora_alpha": 4, "target_modules": list(FLORENCE_TARGETS), "task_type": None},
    recipe={"num_train_epochs": 150, "learning_rate": 1e-4, "dtype": "bfloat16", "dataset_kwargs": {"location_step": 1}},
    items="images_per_epoch",
    ranks=(1, 2, 4, 8),
)
SCALES: dict[str, Scale] = {
    "demo": Scale("demo", (DEMO_TEXT, DEMO_DETECTION), conv_layers=(10, 12, 20), conv_ranks=(1, 8), conv_epochs=24),
    "small": Scale("small", (SMALL_TEXT,), conv_epochs=24, searches=False),
    "paper": Scale("paper", (PAPER_TEXT, PAPER_DETECTION), conv_layers=(10, 11, 12, 13, 14, 20), conv_ranks=(1, 2, 4, 8), conv_epochs=2000),
}
