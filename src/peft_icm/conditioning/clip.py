"""`clip`: the text and image towers of an open_clip model."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from .base import TaskEncoder, weights_sha256

MERGES = "bpe_merges.txt.gz"
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"


class ClipEncoder(TaskEncoder):
    """Text and pictures in the space that CLIP's two towers share.

    Of a text it is the EOT token's state in the last layer, the paper's task vector (section 4.1), projected or not; of a picture the
    projected embedding.

    Args:
        model (`open_clip.CLIP`): With its two towers, and how its pictures are prepared.
        tokenizer: Of that model.
        checkpoint (`str`): Where it came from.
        model_cfg (`dict`): open_clip's config of the model.
        pretrained (`str`, *optional*): open_clip's tag of the weights.
        projected (`bool`, defaults to `True`): The embedding that is shared with pictures; otherwise a text's state before the projection,
            and no pictures.
    """

    kind: ClassVar[str] = "clip"
    accepts = ("text", "images")

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        checkpoint: str,
        model_cfg: dict[str, Any],
        pretrained: str | None = None,
        projected: bool = True,
    ):
        self.model, self.tokenizer, self.model_cfg, self.projected = model.eval(), tokenizer, model_cfg, projected
        self.preprocess = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), is_train=False)
        self.config = {
            "kind": self.kind,
            "checkpoint": checkpoint,
            "pretrained": pretrained,
            "projected": projected,
            "dim": model_cfg["embed_dim"] if projected else model_cfg["text_cfg"]["width"],
            "sha256": weights_sha256(model),
        }

    @classmethod
    def from_pretrained(cls, checkpoint: str, *, pretrained: str | None = None, projected: bool = True, **_: Any) -> ClipEncoder:
        """Load any open_clip model.

        Args:
            checkpoint (`str`): A model name of open_clip (`"ViT-L-14"`), `"hf-hub:org/repo"`, or a folder with
                `open_clip_config.json` and weights.
            pretrained (`str`, *optional*): open_clip's tag (`"openai"`) or a file of weights; needed for model names.
            projected (`bool`, defaults to `True`): See the class.

        Raises:
            `ValueError`: If open_clip does not know the model, a model name comes without weights, or the weights do not fit the config.
        """
        if os.path.isdir(checkpoint):
            if not (Path(checkpoint) / CONFIG).is_file():
                raise ValueError(f"{checkpoint} is no open_clip checkpoint: it has no {CONFIG}.")
            model_cfg = json.loads((Path(checkpoint) / CONFIG).read_text())["model_cfg"]
            name = f"local-dir:{checkpoint}"
            # A trimmed vocabulary travels as a file of merges, which open_clip's config cannot name by a relative path.
            merges = Path(checkpoint) / MERGES
            trimmed = {"bpe_path": str(merges)} if merges.is_file() else {}
        else:
            name, trimmed = checkpoint, {}
            model_cfg = open_clip.get_model_config(checkpoint) or {}
            if not model_cfg:
                raise ValueError(f"open_clip has no model {checkpoint!r}, and no such folder exists: see open_clip.list_models().")
            if pretrained is None and not checkpoint.startswith("hf-hub:"):
                tags = open_clip.list_pretrained_tags_by_model(checkpoint)
                raise ValueError(f"{checkpoint} needs pretrained=, one of {', '.join(tags)} or a file of weights.")
        # OpenAI's weights are for another activation than open_clip's config of their names has.
        quick_gelu = open_clip.get_pretrained_cfg(checkpoint, pretrained or "").get("quick_gelu", False)
        model_cfg |= {"quick_gelu": True} if quick_gelu else {}
        try:
            model = open_clip.create_model(name, pretrained=pretrained, force_quick_gelu=quick_gelu, require_pretrained=True)
        except (RuntimeError, AssertionError) as error:
            reason = textwrap.shorten(str(error).splitlines()[-1], 300)  # the last of the tensors that do not fit
            raise ValueError(f"{checkpoint} cannot be loaded: {reason}. Its weights and its config must be of one model.") from error
        tokenizer = open_clip.get_tokenizer(name, context_length=model_cfg["text_cfg"].get("context_length"), **trimmed)
        return cls(model, tokenizer, checkpoint, model_cfg, pretrained, projected)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the configs of model and pictures, weights in bf16 where they are exact in it, and the trimmed merges."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        config = {"model_cfg": self.model_cfg, "preprocess_cfg": open_clip.get_model_preprocess_cfg(self.model)}
        (path / CONFIG).write_text(json.dumps(config, indent=1))
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.model.state_dict().items()}
        halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        exact = all(torch.equal(half.to(tensors[name].dtype), tensors[name]) for name, half in halves.items())
        save_file(halves if exact else tensors, path / f"{WEIGHTS}.part")
        os.replace(path / f"{WEIGHTS}.part", path / WEIGHTS)
        source = Path(self.config["checkpoint"]) / MERGES
        if source.is_file() and source.resolve() != (path / MERGES).resolve():
            (path / MERGES).write_bytes(source.read_bytes())

    def _embed(self, items: list[Any]) -> Tensor:
        if isinstance(items[0], Image.Image):
            if not self.projected:
                raise ValueError("This clip encoder has projected=False, before the space that text and pictures share: load it with True.")
            pixels = torch.stack([self.preprocess(image) for image in items])
            return F.normalize(self.model.encode_image(pixels).float(), dim=1)
        tokens = self.tokenizer(items)
        if self.projected:
            return F.normalize(self.model.encode_text(tokens).float(), dim=1)
        # The projection is the last step of encode_text; a forward without it is one with the identity in its place.
        projection, self.model.text_projection = self.model.text_projection, None
        try:
            return F.normalize(self.model.encode_text(tokens).float(), dim=1)
        finally:
            self.model.text_projection = projection
