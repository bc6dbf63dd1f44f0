"""Two worlds of tasks on tiny bases of the real classes, and a trainer through the loss of their tasks."""

import torch
from peft import LoraConfig
from PIL import Image
from test_training import arguments
from tiny import TEXTS, florence_processor, florence_reader, llama, tokenizer

from peft_icm import ICMConfig, ICMTrainer
from peft_icm.conditioning import StatisticsEncoder
from peft_icm.tasks.annotated_images import AnnotatedImage
from peft_icm.tasks.detection import DetectionTask
from peft_icm.tasks.language_modeling import LanguageModelingTask

NAMES = ("sonnets", "novels", "genesis", "letters")
COLOURS = ("red", "green", "blue", "white")


def text_world(folder):
    """A Llama on disk with four text tasks: base, tasks, LoRA, and options of their examples."""
    torch.manual_seed(0)
    llama(vocab_size=len(tokenizer()), max_position_embeddings=256).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    texts = [*TEXTS, TEXTS[0][::-1]]
    tasks = [LanguageModelingTask(name, [f"write {name}"], [text], [text]) for name, text in zip(NAMES, texts, strict=True)]
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return folder, tasks, lora, {"block_size": 32}


def detection_world(folder):
    """A Florence-2 on disk with four classes of coloured squares."""
    torch.manual_seed(0)
    florence_reader().save_pretrained(folder)
    florence_processor().save_pretrained(folder)
    images = []
    for index in range(24):
        picture = Image.new("RGB", (32, 32))
        colour, left = COLOURS[index % 4], index % 3 * 8
        picture.paste(Image.new("RGB", (8, 8), colour), (left, 8))
        images.append(AnnotatedImage(picture, [[left, 8, left + 8, 16]], [colour]))
    tasks = [DetectionTask(colour, [f"detect {colour} squares"], colour, images, images, answer="object") for colour in COLOURS]
    return folder, tasks, LoraConfig(r=2, target_modules=["q_proj", "fc2", "lm_head"]), {"location_step": 50, "negatives": 1.0}


def trainer(world, folder, tasks=None, model=None, encoder=None, **options):
    base, found, lora, data = world
    settings = {
        "objective": "task", "max_steps": 6, "per_device_train_batch_size": 6, "learning_rate": 5e-3, "dataset_kwargs": data,
        "max_handful": 2, "logging_steps": 1, **options,
    }  # fmt: skip
    return ICMTrainer(
        model or ICMConfig(latent_size=4, hidden_size=16, num_components=8),
        arguments(folder, **settings),
        encoder=encoder or StatisticsEncoder.from_pretrained(str(base)),
        tasks=tasks or found[:3],
        eval_tasks=found[3:],
        base_model=base,
        lora_config=lora,
    )
