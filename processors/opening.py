"""Open the processor of a model without torch and torchvision.

The Hugging Face classes do the work wherever they run on PIL and NumPy. `AutoProcessor` itself cannot open them: it
wants torchvision for a part that images never use (videos), so the parts are opened one by one and put together as it
would. The same parts are taken where torchvision is installed: tensors must not depend on the machine.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import BundleError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Where `AutoProcessor` looks for the name of the processor's class, in its order.
_NAMING = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json",
)  # fmt: skip
# Image processors that transformers has for torchvision only, and the modules of ours.
_TWINS = {
    "Cohere2VisionImageProcessor": ".cohere2",
    "Lfm2VlImageProcessor": ".lfm2",
    "PerceptionLMImageProcessor": ".perception",
}


class Processor:
    """A Hugging Face processor that takes images and a text, and gives NumPy arrays.

    Everything else (`tokenizer`, `image_processor`, `chat_template`, `image_token`, `save_pretrained`, …) is the
    wrapped processor's own.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet: a copy or an unpickled object asks before `__init__` ran
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def separator(self) -> str:
        """What stands between an image and text in a prompt without a chat template."""
        return "" if type(self.inner).__name__ == "PaliGemmaProcessor" else "\n"

    def __call__(
        self,
        images: Sequence[Image.Image] | None = None,
        text: str = "",
        *,
        videos: Any = None,
        return_tensors: str = "np",
    ) -> dict[str, np.ndarray]:
        """The model's inputs for one prompt; `text` holds the processor's own placeholder for each image.

        Raises:
            BundleError: a video, or another number of placeholders than images.
        """
        import numpy as np

        if videos is not None:
            refuse_video()
        if return_tensors != "np":
            raise ValueError(f"return_tensors={return_tensors!r}: NumPy only")
        options: dict[str, Any] = {"return_tensors": "np"}
        # As `apply_chat_template(tokenize=True)` does: a template that wrote the BOS has done so for the tokenizer.
        bos = self.inner.tokenizer.bos_token
        if bos and text.startswith(bos):
            options["add_special_tokens"] = False
        if not images and type(self.inner).__name__ == "PaliGemmaProcessor":
            # It takes no prompt without an image; what follows its image tokens is this.
            made = self.inner.tokenizer(f"{bos}{text}\n", add_special_tokens=False, return_tensors="np")
            return {name: np.asarray(value) for name, value in made.items()}
        try:
            made = self.inner(images=list(images) if images else None, text=text, **options)
        except ValueError as error:
            raise BundleError(f"the processor refuses the prompt: {error}", hint="one placeholder per image") from error
        # PaliGemma makes training labels out of every prompt.
        arrays = {name: np.asarray(value) for name, value in made.items() if name != "labels"}
        ragged = [name for name, array in arrays.items() if array.dtype == object]
        if ragged:  # without torch, transformers packs them instead of refusing
            raise BundleError(
                f"the processor refuses the prompt: images of unlike `{ragged[0]}`", hint="give one image"
            )
        return arrays

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The processor's own, but a video in the conversation is refused."""
        turns = conversation if isinstance(conversation, (list, tuple)) else []
        content = [part for turn in turns if isinstance(turn, dict) for part in turn.get("content") or ()]
        if any(isinstance(part, dict) and part.get("type") == "video" for part in content):
            refuse_video()
        return self.inner.apply_chat_template(conversation, **options)


def open_processor(
    name_or_folder: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Processor:
    """The processor of a folder or hub id, with PIL image backend.

    Raises:
        ModelError: there is none, its files are damaged, or it needs torchvision.
    """
    name = str(name_or_folder)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        return Processor(_assemble(name, options))
    except Exception as error:  # tokenizers raises bare `Exception` for a damaged tokenizer.json
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"`{name}`: no processor: {first}",
            hint="save the processor (image processor, tokenizer, chat template) beside the weights",
        ) from error


def refuse_video() -> NoReturn:
    """Raises BundleError."""
    raise BundleError("a video was given, but vlmcut prepares images only", hint="give single frames as images")


def processor_class(name: str) -> Any:
    """transformers' class of that name, made to do without torchvision.

    Raises:
        ModelError: transformers has none.
    """
    import transformers

    if name == "PixtralProcessor":
        return _pixtral()
    if name == "SmolVLMProcessor":
        module: Any = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
        # `__init__` refuses to be without num2words, which only words the prompts of videos.
        module.num2words = module.num2words or str
    stock = getattr(transformers, name, None)
    if stock is None:
        raise ModelError(f"transformers has no `{name}`")
    if "video_processor" not in stock.get_attributes():
        return stock

    def check(self: Any, part: str, given: Any) -> Any:
        # The class that transformers would compare with is missing where torchvision is.
        return type(given) if part == "video_processor" else stock.check_argument_for_proper_class(self, part, given)

    # Under its own name, for that is what `save_pretrained` writes.
    return type(name, (stock,), {"check_argument_for_proper_class": check, "__module__": stock.__module__})


def _pixtral() -> Any:
    """`PixtralProcessor`: its module imports torchvision's image processor for a function that PIL's has as well."""
    from transformers.utils.import_utils import is_torchvision_available

    package = "transformers.models.pixtral"
    wanted, module = f"{package}.image_processing_pixtral", f"{package}.processing_pixtral"
    if module in sys.modules or is_torchvision_available():
        return importlib.import_module(module).PixtralProcessor
    sys.modules[wanted] = importlib.import_module(f"{package}.image_processing_pil_pixtral")
    try:
        return importlib.import_module(module).PixtralProcessor
    finally:
        del sys.modules[wanted]


def _assemble(name: str, options: dict[str, Any]) -> Any:
    """What `AutoProcessor.from_pretrained(name, backend="pil")` gives, with a stand-in for videos."""
    from transformers import AutoConfig, AutoProcessor

    configs = list(_configs(name, options["revision"]))
    if options["trust_remote_code"] and any("AutoProcessor" in c.get("auto_map", {}) for c in configs):
        return AutoProcessor.from_pretrained(name, backend="pil", **options)
    named = [c["processor_class"] for c in configs if c.get("processor_class")]
    if not named:
        kind = AutoConfig.from_pretrained(name, **options).model_type
        auto: Any = importlib.import_module("transformers.models.auto.processing_auto")
        named = [auto.PROCESSOR_MAPPING_NAMES.get(kind)]
    if named[0] is None:
        raise ModelError("no file names a processor class")
    made = processor_class(named[0])
    settings, _ = made.get_processor_dict(name, **options)
    parts = [_open_part(part, made, name, options) for part in made.get_attributes()]
    return made.from_args_and_dict(parts, settings)


def _configs(name: str, revision: str | None) -> Iterator[dict[str, Any]]:
    from transformers.utils.hub import cached_file

    for file in _NAMING:
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is None:
            continue
        found = json.loads(Path(path).read_bytes())
        if not isinstance(found, dict):
            raise ModelError(f"`{path}` is not a JSON object")
        yield found


def _open_part(part: str, processor: Any, name: str, options: dict[str, Any]) -> Any:
    import transformers

    openers: dict[str, Callable[..., Any]] = {
        "image_processor": _open_images,
        "video_processor": _open_videos,
        "tokenizer": transformers.AutoTokenizer.from_pretrained,
        "feature_extractor": transformers.AutoFeatureExtractor.from_pretrained,
    }
    if part not in openers:
        raise ModelError(f"`{processor.__name__}` wants a `{part}`, which vlmcut does not open")
    if part == "tokenizer" and processor.__name__ == "PixtralProcessor":
        # As transformers does: Pixtral's tokenizer_config.json names a class that does not fit its tokenizer.json.
        return transformers.PreTrainedTokenizerFast.from_pretrained(name, **options)
    return openers[part](name, **options)


def _open_images(name: str, **options: Any) -> Any:
    from transformers import AutoImageProcessor
    from transformers.image_processing_base import ImageProcessingMixin

    settings, _ = ImageProcessingMixin.get_image_processor_dict(name, **options)
    stock = str(settings.get("image_processor_type")).removesuffix("Fast")
    if stock in _TWINS:
        return getattr(importlib.import_module(_TWINS[stock], __package__), f"{stock}Pil").from_dict(settings)
    made = AutoImageProcessor.from_pretrained(name, backend="pil", **options)
    if getattr(made, "backend", "pil") != "pil":
        raise ModelError(f"`{type(made).__name__}` needs torchvision")
    return made


def _open_videos(name: str, **options: Any) -> Any:
    from .no_video import NoVideo

    try:
        return NoVideo.from_pretrained(name, **options)
    except OSError:  # the folder says nothing about videos
        return NoVideo()
