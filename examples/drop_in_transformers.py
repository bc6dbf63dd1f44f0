"""Existing Transformers code with one line changed, four times: pipeline, load_adapter, Trainer, merge_and_unload.

python examples/drop_in_transformers.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from peft_icm import ICMGenerator, bundled_generator, save_adapter
from peft_icm.bundled import bundled_folder
from peft_icm.tasks.language_modeling import load_tasks, nll

torch.manual_seed(0)  # adapters are drawn: the same ones in each run
BASE = str(bundled_folder("text") / "generator" / "base_model")
generator = ICMGenerator.from_pretrained(bundled_generator("text"))
tokenizer = AutoTokenizer.from_pretrained(BASE)
task = next(task for task in load_tasks(bundled_folder("text") / "tasks") if task.name == "bible")

# 1. pipeline. Before: model = AutoModelForCausalLM.from_pretrained(BASE)
model = generator.generate_adapter("the King James Bible", AutoModelForCausalLM.from_pretrained(BASE))
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
print("pipeline:", repr(generate("And the LORD said", max_new_tokens=30, do_sample=False)[0]["generated_text"]))

with tempfile.TemporaryDirectory() as folder:
    # 2. load_adapter of transformers, on the saved folder; peft_icm is no longer needed. Before: nothing
    save_adapter(model, folder)
    plain = AutoModelForCausalLM.from_pretrained(BASE)
    plain.load_adapter(folder)
    ids = tokenizer("And the LORD said", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        difference = (plain(**ids).logits - model(**ids).logits).abs().max()
    print(f"load_adapter: logits differ by {difference:.1e}")

    # 3. Trainer goes on from the generated adapter. Before: model = get_peft_model(base, LoraConfig(...))
    model = generator.generate_adapter("the King James Bible", AutoModelForCausalLM.from_pretrained(BASE), is_trainable=True)
    train, test = task.test_texts[:-1], task.test_texts[-1:]
    base, before = (nll(each, tokenizer, test)[0].perplexity for each in (AutoModelForCausalLM.from_pretrained(BASE), model))
    task.train_texts = train
    args = TrainingArguments(folder, num_train_epochs=1, learning_rate=5e-4, report_to=[], save_strategy="no", use_cpu=True)
    Trainer(model, args, train_dataset=task.train_dataset(tokenizer, block_size=64)).train()
    after = nll(model, tokenizer, test)[0].perplexity
    print(f"Trainer: perplexity of a held-out passage: base {base:.2f}, generated {before:.2f}, trained on {after:.2f}")

# 4. merge_and_unload: a plain LlamaForCausalLM
merged = model.eval().merge_and_unload()
print("merged:", type(merged).__name__)
