"""The keys of adapters that were trained on Florence-2's remote code, in the names of transformers' own class."""

from __future__ import annotations

FLORENCE2_KEY_MAP: tuple[tuple[str, str], ...] = (
    # With lm_head among the targets peft saved the base's own weight too, unless told not to: it is no part of the adapter.
    (r".*\.base_layer\.weight", ""),
    (r"^base_model\.model\.language_model\.lm_head\.", "base_model.model.lm_head."),
    (r"^base_model\.model\.language_model\.model\.", "base_model.model.model.language_model."),
    (r"^base_model\.model\.image_pos_embed\.", "base_model.model.model.multi_modal_projector.image_position_embed."),
    (r"^base_model\.model\.vision_tower\.", "base_model.model.model.vision_tower."),
    (r"(\.vision_tower\.convs\.\d+)\.proj\.", r"\1.conv."),
    # Each branch of a DaViT block was wrapped in a PreNorm, `fn`; inside it a convolution was named `dw` and an MLP `net`.
    (r"(\.vision_tower\.blocks\..*)\.fn(?:\.dw|\.net)?\.", r"\1."),
)
"""Ordered (regex, replacement) pairs: from `microsoft/Florence-2-*` with `trust_remote_code` to `Florence2ForConditionalGeneration`.

For `key_map=` of [`AdapterLayout.from_pretrained`] and [`AdapterCollection.from_adapters`]. Every module that can carry a LoRA is in
it: the targets `q_proj`, `k_proj`, `v_proj`, `fc2` and `lm_head` are spelt alike in both trees. Native keys stay as they are.
"""
