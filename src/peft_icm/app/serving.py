"""What the page calls: a request heard, answered, shown beside the base, packed. Plain Python, for many users of one base."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoProcessor, PreTrainedModel

from ..adapters.base import load_base, opening_base, share_tensors
from ..adapters.saving import CONFIG, push_adapter, save_adapter
from ..bundled import BUNDLES
from ..generator.modeling_icm import ICMGenerator
from ..generator.reading import Reading
from ..hub.files import published
from ..pictures import open_picture
from ..tasks.detection import detect, load_detection_tasks
from ..tasks.likelihood import UNBOUNDED_WINDOW, context_size
from ..unknown import OnUnknown, check_request

MAX_SENTENCE = 500  # characters of a request
MAX_TEXT = 2000  # characters of a text, from its end, that are gone on from
MAX_EXAMPLES = 32
MAX_PICTURES = 8  # that show what is meant
MAX_SCENES = 4  # pictures that are looked at
SHOWN = 3  # bundled scenes that are looked at where there are none of the user's own
SIDE = 1024  # pixels, the longer side of a picture that is looked at
NEW_TOKENS = 60
SECONDS = 60.0  # after which a request is stopped
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """What somebody asks for.

    Args:
        text (`str`, *optional*): A sentence of at most 500 characters.
        examples (`tuple[str, ...]`): At most 32, for generators that read examples.
        images (`tuple[PIL.Image.Image, ...]`): At most 8, for generators that read pictures.
        strength (`float`, defaults to 1.0): Factor on dW.
        seed (`int`, defaults to 0): Of z and of the continuation.
        on_unknown (`str`, defaults to `"warn"`): See [`~ICMGenerator.generate_adapter`].

    Raises:
        `ValueError`: If nothing is asked for, too much is given, or a number is out of range.
    """

    text: str | None = None
    examples: tuple[str, ...] = ()
    images: tuple[Image.Image, ...] = ()
    strength: float = 1.0
    seed: int = 0
    on_unknown: OnUnknown = "warn"

    def __post_init__(self) -> None:
        if not (self.text or self.examples or self.images):
            raise ValueError("Say what the adapter is for, in a sentence such as 'detect sofas', or show it.")
        if len(self.text or "") > MAX_SENTENCE:
            raise ValueError(f"The sentence has {len(self.text or '')} characters: at most {MAX_SENTENCE} are read.")
        for what, given, most in (("examples", self.examples, MAX_EXAMPLES), ("pictures", self.images, MAX_PICTURES)):
            if len(given) > most:
                raise ValueError(f"{len(given)} {what} are shown: at most {most} are read.")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"The seed is {self.seed!r}, it must be a whole number from 0 to {MAX_SEED}.")
        check_request(self.on_unknown, self.strength)

    @property
    def inputs(self) -> dict[str, Any]:
        """As [`~ICMGenerator.read`] and [`~ICMGenerator.generate_adapter`] take it."""
        return {"text": self.text, "examples": list(self.examples) or None, "images": list(self.images) or None}


@dataclass(frozen=True)
class Token:
    """A piece of text and how much it surprised the model.

    Args:
        text (`str`): One token, or several where a character takes several.
        nats (`float`): -ln p of it, given what stands before.
        new (`bool`): Whether the model wrote it.
    """

    text: str
    nats: float
    new: bool


@dataclass(frozen=True)
class Scene:
    """A picture and what base and adapted model find in it.

    Args:
        picture (`PIL.Image.Image`): In RGB.
        base, adapted (`list`): `(label, score, box)`, the box xyxy in pixels.
    """

    picture: Image.Image
    base: list[tuple[str, float, list[float]]]
    adapted: list[tuple[str, float, list[float]]]


class Service:
    """A generator and its base, for many users at once.

    Every answer is a model of its own on the memory of the one base, so no user meets another's adapter, and what nobody holds is gone.

    Args:
        generator ([`ICMGenerator`]): For a causal language model or a Florence-2.
        base_model (`str`, *optional*): Hub id or folder of the base; by default the generator's own.
        token (`str`, *optional*): Access token, for the base.

    Raises:
        `OSError`: If the base cannot be found or read.
        `ValueError`: If the generator names no base, or the base does not fit it, or is neither a causal language model nor a Florence-2.
    """

    def __init__(self, generator: ICMGenerator, base_model: str | None = None, token: str | None = None):
        self.generator = generator
        self.base: Any = generator.load_base() if base_model is None else load_base(generator.layout, base_model, None, token=token)
        generator.layout.check_base(self.base)
        self.detects = self.base.config.model_type == "florence2"
        if not self.detects and (self.base.config.is_encoder_decoder or not self.base.can_generate()):
            raise ValueError(f"The base is a {type(self.base).__name__}: the page shows causal language models and Florence-2.")
        with opening_base(str(self.base.name_or_path)):
            self.processor: Any = AutoProcessor.from_pretrained(self.base.name_or_path, token=token)
        self._drawing = threading.Lock()  # from torch's global generator, which a continuation is seeded through

    @property
    def shows(self) -> tuple[str, ...]:
        """What may stand in the place of a sentence, or beside it: `"images"`, `"examples"`."""
        return tuple(name for name in self.generator.encoder.accepts if name != "text")

    @property
    def reads(self) -> bool:
        """Whether it may be asked in a sentence."""
        return "text" in self.generator.encoder.accepts

    def hear(self, request: Request) -> Reading | None:
        """What the generator hears in a request; `None` where it takes it as it is, without telling.

        Args:
            request ([`Request`]): What is asked for.
        """
        return self.generator.read(**request.inputs) if self.generator.can_read(**request.inputs) else None

    def adapt(self, request: Request) -> PeftModel:
        """The base with the adapter that is asked for; the base itself stays as it is.

        Args:
            request ([`Request`]): What is asked for.

        Raises:
            `ValueError`: See [`~ICMGenerator.generate_adapter`].
        """
        return self.generator.generate_adapter(
            base_model=share_tensors(cast(PreTrainedModel, self.base)),
            generator=torch.Generator().manual_seed(request.seed),
            on_unknown=request.on_unknown,
            strength=request.strength,
            **request.inputs,
        )

    @torch.no_grad()
    def go_on(self, model: Any, text: str, seed: int, seconds: float = SECONDS / 3) -> list[Token]:
        """A text and how a model goes on from it, with the surprise of each token.

        Args:
            model (`PreTrainedModel` or `PeftModel`): The base, or what [`~Service.adapt`] returned.
            text (`str`): Its last 2,000 characters are read, and of these what leaves room for 60 tokens.
            seed (`int`): Of the continuation.
            seconds (`float`, defaults to 20): After which it begins no token.

        Returns:
            `list[Token]`: The text's, then those that the model wrote: 60, or as many as it could in that time.

        Raises:
            `ValueError`: If there is no text, or the tokenizer has neither BOS nor EOS to put before it.
        """
        if not text.strip():
            raise ValueError("There is no text to go on from: write a line or two.")
        tokenizer = self.processor
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError("The base's tokenizer has neither a BOS nor an EOS token to put before the first token of a text.")
        room = (context_size(model.config) or UNBOUNDED_WINDOW) - NEW_TOKENS - 1
        own = tokenizer(text[-MAX_TEXT:], add_special_tokens=False, verbose=False)["input_ids"][-room:]
        ids = torch.tensor([[start, *own]], device=model.device)
        with self._drawing, torch.random.fork_rng():
            torch.manual_seed(seed)
            tokens = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.7, max_new_tokens=NEW_TOKENS,
                max_time=seconds, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        nats = F.cross_entropy(model(input_ids=tokens).logits[0, :-1].float(), tokens[0, 1:], reduction="none")
        return _pieces(tokenizer, tokens[0, 1:].tolist(), nats.tolist(), len(own))

    def look(self, model: PeftModel, pictures: Sequence[Image.Image]) -> list[Scene]:
        """What base and adapted model find in pictures.

        Args:
            model (`PeftModel`): What [`~Service.adapt`] returned.
            pictures (`Sequence[PIL.Image.Image]`): One to four; made smaller where a side is longer than 1,024 pixels.

        Returns:
            `list[Scene]`: Of those that were ready when [`stopped_at`] stopped the others.

        Raises:
            `ValueError`: If there are more than four.
            `TimeoutError`: If not one was ready.
        """
        if len(pictures) > MAX_SCENES:
            raise ValueError(f"{len(pictures)} pictures are to be looked at: at most {MAX_SCENES} are.")
        scenes: list[Scene] = []
        for picture in pictures:
            small = picture.copy()
            small.thumbnail((SIDE, SIDE))
            try:
                base, adapted = (_found(detect(one, self.processor, small, progress=False)[0]) for one in (self.base, model))
            except TimeoutError:
                if not scenes:
                    raise
                break
            scenes.append(Scene(small, base, adapted))
        return scenes

    def loading_lines(self) -> str:
        """Three lines of Python that load the unpacked adapter, without peft_icm."""
        kind, base = type(self.base).__name__, published(self.base.name_or_path)
        return (
            f"from peft import PeftModel\nfrom transformers import {kind}\n"
            f'model = PeftModel.from_pretrained({kind}.from_pretrained("{base}"), "adapter")'
        )


@contextmanager
def stopped_at(moment: float) -> Iterator[None]:
    """Whatever models compute in this thread is stopped at a moment, before the next of their layers.

    Args:
        moment (`float`): Of `time.monotonic()`.

    Raises:
        `TimeoutError`: If it comes.
    """
    own = threading.get_ident()

    def check(*_: Any) -> None:
        if threading.get_ident() == own and time.monotonic() > moment:
            raise TimeoutError(f"Stopped after {SECONDS:.0f} seconds: try a shorter text, or fewer or smaller pictures.")

    hook = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def push(model: PeftModel, repo_id: str, token: str) -> str:
    """Push an adapter into a private repo with the rights of whoever asks, never with those of this machine.

    Args:
        model (`PeftModel`): What [`~Service.adapt`] returned.
        repo_id (`str`): `"org/name"`.
        token (`str`): Their access token; it is kept nowhere.

    Returns:
        `str`: Address of the commit.

    Raises:
        `ValueError`: If there is no token, or `repo_id` cannot be one.
        `OSError`: If the Hub refuses or does not answer.
    """
    if not token.strip():
        raise ValueError("There is no token: make one with the right to write at huggingface.co/settings/tokens.")
    return str(push_adapter(model, repo_id.strip(), token=token.strip(), private=True).commit_url)


@contextmanager
def zipped(model: PeftModel) -> Iterator[Path]:
    """The PEFT folder of an adapter, `adapter/`, as a zip that names no path of this machine and is deleted afterwards.

    Args:
        model (`PeftModel`): What [`~Service.adapt`] returned.

    Yields:
        `Path`: The zip.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_adapter(model, Path(temporary, "files", "adapter"))
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps(published(config), indent=2, sort_keys=True), encoding="utf-8")
        yield Path(shutil.make_archive(str(Path(temporary, "adapter")), "zip", folder.parent))


def scenes(reading: Reading | None) -> list[Image.Image]:
    """Bundled pictures to look at: with what was heard, where any is of it.

    Args:
        reading ([`Reading`], *optional*): What was heard.

    Returns:
        `list[PIL.Image.Image]`: Three.
    """
    tasks = load_detection_tasks(BUNDLES / "detection" / "tasks")
    labels = {task.name: task.label for task in tasks}
    wanted = labels.get(reading.task) if reading else None
    pictures = sorted(tasks[0].test_images, key=lambda image: wanted not in image.labels)
    return [image.load() for image in pictures[:SHOWN]]


def pictures_of(files: Sequence[str] | None) -> list[Image.Image]:
    """Uploaded pictures, opened as viewers show them.

    Args:
        files (`Sequence[str]`, *optional*): Their paths.

    Raises:
        `ValueError`: If one is no picture, damaged, or too large to be opened.
    """
    return [open_picture(file) for file in files or ()]


def one_line(error: Exception) -> str:
    """What may be told to others of an error: one line, of a path of this machine its last part alone.

    Args:
        error (`Exception`): One that a user can cause.

    Example:

    ```python
    >>> one_line(ValueError("/tmp/gradio/3f/cat.png is no picture:\\n see https://hf.co/docs"))
    'cat.png is no picture: see https://hf.co/docs'

    ```
    """
    message = " ".join(str(error).split())
    for home in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):  # they may have blanks in them
        message = message.replace(f"{home}/", "/")
    return re.sub(r"(?<![\w:/.~])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])*(?=[^\s/\\])", "", message)


def _pieces(tokenizer: Any, ids: list[int], nats: list[float], given: int) -> list[Token]:
    """Tokens as text: what each adds to what stands before; one that ends within a character waits for the next."""
    pieces, shown, waiting = [], "", 0.0
    for end, surprise in enumerate(nats, 1):
        waiting += surprise
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end not in (given, len(ids)):
            continue
        pieces.append(Token(text[len(shown) :], waiting, end > given))
        shown, waiting = text, 0.0
    return pieces


def _found(found: dict[str, Any]) -> list[tuple[str, float, list[float]]]:
    return list(zip(found["labels"], found["scores"].tolist(), found["boxes"].tolist(), strict=True))
