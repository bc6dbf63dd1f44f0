"""Tiny instances of the real classes, built in milliseconds."""

import functools

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_icm import AdapterLayout, ICMConfig, ICMGenerator

FLORENCE_TARGETS = ["q_proj", "o_proj", "k_proj", "v_proj", "linear", "Conv2d", "lm_head", "fc2"]
CONDITION_DIM = 8


def llama(layers=2, **kwargs):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{**sizes, **kwargs}))


def llama_lora(r=2, layers=2, dtype=torch.float32, **kwargs):
    config = LoraConfig(r=r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(llama(layers, **kwargs).to(dtype), config, autocast_adapter_dtype=False)


def florence(vocab_size=128, image_token_id=51289, **text):
    tiny = {
        "vision_config": {
            "embed_dim": [8, 16], "depths": [1, 1], "num_heads": [1, 2], "num_groups": [1, 2], "patch_size": [7, 3],
            "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4, "projection_dim": 16,
        },
        "text_config": {
            "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": vocab_size, **text,
        },
    }  # fmt: skip
    return Florence2ForConditionalGeneration(Florence2Config(**tiny, image_token_id=image_token_id))


def florence_lora(r=1):
    return get_peft_model(florence(), LoraConfig(r=r, target_modules=FLORENCE_TARGETS, task_type=None))


def filled(layout, seed=0):
    torch.manual_seed(seed)
    return {key: torch.randn(shape).to(layout.torch_dtype) for key, shape in zip(layout.keys, layout.shapes, strict=True)}


def llama_layout():
    return AdapterLayout.from_peft_model(llama_lora())


def florence_layout():
    return AdapterLayout.from_peft_model(florence_lora())


def generator(layout=None, **kwargs):
    """A generator of random weights: small, but every part of it works."""
    torch.manual_seed(0)
    options = {"condition_dim": CONDITION_DIM, "latent_size": 4, "hidden_size": 16, "num_components": 6, **kwargs}
    tasks = [{"name": name, "description": f"about {name}"} for name in ("cats", "dogs", "sofas")]
    model = ICMGenerator(ICMConfig(layout=(layout or llama_layout()).to_dict(), tasks=tasks, **options))
    return model.eval()


@functools.cache
def tokenizer():
    """Bytes as tokens, with <s>, </s> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@functools.cache
def florence_processor():
    """32 x 32 pictures, bytes as tokens, and Florence-2's own special tokens, with BART's numbers for <s>, <pad> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    reader = PreTrainedTokenizerFast(tokenizer_object=bpe, **names, extra_special_tokens={"image_token": "<image>"})
    locations = [f"<loc_{number}>" for number in range(1000)]
    reader.add_tokens([AddedToken(token, normalized=False) for token in ["<od>", "</od>", *locations, "<sep>"]], special_tokens=True)
    # The model's stem and second stage stride by 4 and 2: 4 x 4 patches, and one token for their mean.
    pictures = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False, image_seq_length=17)
    return Florence2Processor(pictures, reader, post_processor_config={"pure_text": {}, "description_with_bboxes": {}})


def florence_reader(**text):
    """A Florence-2 that fits `florence_processor()`; with few `max_position_embeddings`, its answers end soon."""
    processor = florence_processor()
    return florence(len(processor.tokenizer), processor.image_token_id, **text)


TEXTS = [
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate:\nRough winds do shake the darling buds of May,\n"
    "And summer's lease hath all too short a date;\nSometime too hot the eye of heaven shines,\nAnd often is his gold complexion dimm'd;",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. However little\n"
    "known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so well fixed in the minds.",
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was upon the face of\n"
    "the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be light: and there was light.",
]
