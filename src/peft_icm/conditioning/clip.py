"""`clip`: the text and image towers of an open_clip model."""

from __future__ import annotations

import gzip
import json
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Unpack

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..disk import inside, replacing_folder
from ..hub.files import resolve
from .base import HubOptions, TaskEncoder, load_config, loading
from .clip_config import TEXT_FOLDER, check_clip_config, read_clip_config
from .hashes import config_sha256, processor_parts, weights_sha256

MERGES = "bpe_merges.txt.gz"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
CONFIG = "open_clip_config.json"
HUB = "hf-hub:"
TEXT_MODELS = ("bert", "roberta", "xlm-roberta")  # text towers of transformers that open_clip knows and that are encoders alone
MAX_MERGES = 16 << 20  # bytes, unpacked; open_clip's own file has 3 million


class ClipEncoder(TaskEncoder):
    """Text and pictures in the space that CLIP's two towers share.

    Of a text it is the EOT token's state in the last layer, the paper's task vector (section 4.1), projected, or what a text tower of
    transformers pools; of a picture the projected embedding.

    Args:
        model (`open_clip.CLIP`): With its two towers, and how its pictures are prepared.
        tokenizer: Of that model.
        checkpoint (`str`): Where it came from.
        model_cfg (`dict`): open_clip's config of the model.
        pretrained (`str`, *optional*): open_clip's tag of the weights.
        revision (`str`, *optional*): Revision of the Hub repo.
        merges (`Path`, *optional*): The tokenizer's merges, where they are not open_clip's own.
    """

    kind: ClassVar[str] = "clip"
    options: ClassVar[tuple[str, ...]] = ("pretrained", "projected", "revision")
    accepts = ("text", "images")

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        checkpoint: str,
        model_cfg: dict[str, Any],
        pretrained: str | None = None,
        revision: str | None = None,
        merges: Path | None = None,
    ):
        self.model, self.tokenizer, self.model_cfg, self.merges = model.eval(), tokenizer, model_cfg, merges
        self.max_tokens = tokenizer.context_length
        prepared = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
        self.preprocess = image_transform_v2(prepared, is_train=False)
        own = isinstance(tokenizer, open_clip.SimpleTokenizer)
        self.config = {
            "kind": self.kind,
            "checkpoint": checkpoint,
            "pretrained": pretrained,
            "dim": model_cfg["embed_dim"],
            "sha256": weights_sha256(model),
            "config_sha256": config_sha256(
                model=model_cfg,
                preprocess=asdict(prepared),
                tokenizer=list(tokenizer.encoder) if own else processor_parts(tokenizer.tokenizer),
            ),
        } | ({"revision": revision} if revision else {})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        checkpoint: str,
        *,
        pretrained: str | None = None,
        revision: str | None = None,
        projected: bool = True,
        **hub: Unpack[HubOptions],
    ) -> ClipEncoder:
        """Load an open_clip model.

        Args:
            checkpoint (`str`): A model name of open_clip (`"ViT-L-14"`), `"hf-hub:org/repo"`, or a folder with
                `open_clip_config.json` and `open_clip_model.safetensors`, and with config and tokenizer of a text tower of transformers in
                `text/`.
            pretrained (`str`, *optional*): open_clip's tag (`"openai"`) or a file of weights in safetensors; needed for model names.
            revision (`str`, *optional*): Of the Hub repo.
            projected (`bool`, defaults to `True`): Nothing else is read; encoders saved by peft_icm 0.1.0 name it.
            **hub: `token`, `cache_dir` and `local_files_only`.

        Raises:
            `ValueError`: If open_clip does not know the model, a model name comes without weights, the weights are in no safetensors file
                or do not fit the config, or the config or the merges of a folder or repo hold what [`check_clip_config`] does not allow.
            `OSError`: If the repo cannot be read.
        """
        if projected is not True:
            raise ValueError(f"projected={projected!r}: task vectors before the projection are not made any more, encode the tasks again.")
        if checkpoint.startswith(HUB):
            found = resolve(
                checkpoint.removeprefix(HUB), revision=revision, allow_patterns=[CONFIG, MERGES, *WEIGHTS, f"{TEXT_FOLDER}/*.json"], **hub
            )
            return cls._from_folder(found, checkpoint, revision)
        if Path(checkpoint).is_dir():
            return cls._from_folder(Path(checkpoint), checkpoint, None)
        if checkpoint not in open_clip.list_models():
            raise ValueError(f"open_clip has no model {checkpoint!r}, and no such folder exists: see open_clip.list_models().")
        tags = open_clip.list_pretrained_tags_by_model(checkpoint)
        if pretrained not in tags and Path(pretrained or "").suffix != ".safetensors":
            raise ValueError(f"{checkpoint} needs pretrained=, one of {', '.join(tags)} or a file of weights in safetensors.")
        # OpenAI's weights are for another activation than open_clip's config of their names has.
        quick_gelu = open_clip.get_pretrained_cfg(checkpoint, pretrained).get("quick_gelu", False)
        model_cfg = open_clip.get_model_config(checkpoint) | ({"quick_gelu": True} if quick_gelu else {})
        cache = str(hub["cache_dir"]) if hub.get("cache_dir") else None
        with loading(checkpoint):
            model = open_clip.create_model(
                checkpoint, pretrained=pretrained, force_quick_gelu=quick_gelu, require_pretrained=True, cache_dir=cache
            )
            tokenizer = open_clip.get_tokenizer(checkpoint, cache_dir=cache)
        return cls(model, tokenizer, checkpoint, model_cfg, pretrained)

    @classmethod
    def _from_folder(cls, folder: Path, checkpoint: str, revision: str | None) -> ClipEncoder:
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{checkpoint} is no open_clip checkpoint: it has no {CONFIG}.")
        config = read_clip_config(folder / CONFIG)
        weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if weights is None:
            raise ValueError(
                f"{checkpoint} cannot be loaded: it has no {WEIGHTS[0]}; weights in other formats are not loaded, convert them."
            )
        merges = folder / MERGES if (folder / MERGES).is_file() else None
        model_cfg = dict(config["model_cfg"])
        kind = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
        arguments = {name: value for name, value in model_cfg.items() if name != "custom_text"}
        transformer = model_cfg.get("text_cfg", {}).get("hf_model_name")
        if transformer:
            arguments["text_cfg"] = {**model_cfg["text_cfg"], "hf_model_name": _text_folder(folder, model_cfg)}
        with loading(checkpoint):
            with torch.device("meta"):  # no memory before it is known that the weights are about as many
                wanted = sum(tensor.numel() for tensor in kind(**arguments).state_dict().values())
            with safe_open(weights, "pt") as file:
                found = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
            if wanted > 4 * found + 10_000_000:
                raise ValueError(f"{CONFIG} is of a model of {wanted} numbers, {weights.name} has {found}: they must be of one model.")
            model = kind(**arguments)
            open_clip.load_checkpoint(model, str(weights))
            prepared = {"size": model.visual.image_size} | config.get("preprocess_cfg", {})
            open_clip.model.set_model_preprocess_cfg(model, asdict(PreprocessCfg(**prepared | {"size": model.visual.image_size})))
        if transformer:
            with loading(checkpoint):
                own = HFTokenizer(str(folder / TEXT_FOLDER), context_length=model.context_length, trust_remote_code=False)
            if len(own.tokenizer) > model.vocab_size:
                raise ValueError(
                    f"{checkpoint}: the tokenizer in {TEXT_FOLDER}/ has {len(own.tokenizer)} tokens, its config.json {model.vocab_size}:"
                    " they must be of one model."
                )
            return cls(model, own, checkpoint, model_cfg, revision=revision)
        if merges:
            _check_merges(merges)
        tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length, **({"bpe_path": str(merges)} if merges else {}))
        if tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"{checkpoint}: the tokenizer has {tokenizer.vocab_size} tokens, model_cfg.text_cfg.vocab_size of {CONFIG} is"
                f" {model.vocab_size}: {MERGES} must be that of the model."
            )
        return cls(model, tokenizer, checkpoint, model_cfg, revision=revision, merges=merges)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the configs of model and pictures, each weight in 8 or 16 bit where it is exact in them, and the tokenizer that is its own.

        Args:
            folder (`str` or `Path`): Where to; replaced in one step.

        Raises:
            `ValueError`: If the model has a tokenizer or a text tower of transformers that was loaded by its name: it still is.
        """
        config = {"model_cfg": self.model_cfg, "preprocess_cfg": open_clip.get_model_preprocess_cfg(self.model)}
        config = json.loads(json.dumps(config))
        check_clip_config(config, f"{self.config['checkpoint']} cannot be saved")
        with replacing_folder(folder) as path:
            (path / CONFIG).write_text(json.dumps(config, indent=1))
            tensors = {name: tensor.detach().contiguous() for name, tensor in self.model.state_dict().items()}
            save_file({name: _narrowest(tensor) for name, tensor in tensors.items()}, path / WEIGHTS[0])
            if self.merges:
                shutil.copyfile(self.merges, path / MERGES)
            if self._has_transformer:
                self.model.text.config.save_pretrained(path / TEXT_FOLDER)
                self.tokenizer.tokenizer.save_pretrained(path / TEXT_FOLDER)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each text, those that start and end it too."""
        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]  # with the tokens that start and end every text
        return [len(ids) for ids in self.tokenizer.tokenizer(texts, verbose=False)["input_ids"]]

    def _embed(self, items: list[Any]) -> Tensor:
        weight = next(self.model.parameters())
        if isinstance(items[0], Image.Image):
            pixels = torch.stack([self.preprocess(image) for image in items])
            return F.normalize(self.model.encode_image(pixels.to(weight)).float(), dim=1)
        if self._has_transformer:  # reads as many tokens as there are
            tokens = self.tokenizer.tokenizer(
                items, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).input_ids
        else:
            tokens = self.tokenizer(items)
        return F.normalize(self.model.encode_text(tokens.to(weight.device)).float(), dim=1)

    @property
    def _has_transformer(self) -> bool:
        return self.model_cfg.get("text_cfg", {}).get("hf_model_name") == TEXT_FOLDER


def _text_folder(folder: Path, model_cfg: dict[str, Any]) -> str:
    """The folder of a checkpoint's text tower, its config checked."""
    text = inside(folder, TEXT_FOLDER)  # not its files: those of the Hub's cache are links into its blobs
    if not model_cfg.get("custom_text"):
        raise ValueError(f"{folder / CONFIG}: model_cfg.text_cfg.hf_model_name needs model_cfg.custom_text to be true.")
    config = load_config(str(text))
    if config.model_type not in TEXT_MODELS:
        raise ValueError(f"{text / 'config.json'}: model_type is {config.model_type!r}, it must be one of {', '.join(TEXT_MODELS)}.")
    return str(text)


def _narrowest(tensor: Tensor) -> Tensor:
    """In the fewest bits that hold every value."""
    for dtype in (torch.float8_e4m3fn, torch.bfloat16) if tensor.is_floating_point() else ():
        narrow = tensor.to(dtype)
        if torch.equal(narrow.to(tensor.dtype), tensor):
            return narrow
    return tensor


def _check_merges(file: Path) -> None:
    """Refuse merges that are no gzip of text, or that unpack to more than any vocabulary has."""
    try:
        with gzip.open(file) as packed:
            text = packed.read(MAX_MERGES + 1)
        text.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no gzip of merges ({error}): download the checkpoint again.") from error
    if len(text) > MAX_MERGES:
        raise ValueError(f"{file} unpacks to more than {MAX_MERGES >> 20} MiB: no vocabulary has that many merges.")
