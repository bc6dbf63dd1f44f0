"""A sentence in, a PEFT adapter out: the bundled generator, offline, on a CPU."""

from transformers import AutoTokenizer

from peft_icm import ICMGenerator, bundled_generator, save_adapter

generator = ICMGenerator.from_pretrained(bundled_generator("text"))
model = generator.generate_adapter("continue a Shakespeare play")  # a native peft.PeftModel
tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)
inputs = tokenizer("HAMLET. ", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60, do_sample=True)[0], skip_special_tokens=True))
save_adapter(model, "shakespeare-lora")  # an ordinary PEFT folder
