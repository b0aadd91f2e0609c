"""Pixtral's processor; transformers' own module imports torchvision, for a function of the image processor."""

from __future__ import annotations

from typing import Any

from transformers.processing_utils import ProcessorMixin


class PixtralProcessor(ProcessorMixin):
    """Writes one row of placeholders per row of merged patches, each ended by a break, the last by an end.

    Source: transformers 5.23, models/pixtral/processing_pixtral.py; the same arguments, attributes and tokens. Its
    default of returning torch tensors is left out.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: Any = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **_: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_break_token_id = tokenizer.convert_tokens_to_ids(image_break_token)
        self.image_end_token_id = tokenizer.convert_tokens_to_ids(image_end_token)
        self.image_token_ids = [self.image_token_id, self.image_break_token_id, self.image_end_token_id]

    def _process_images(self, images: Any, **options: Any) -> Any:
        options["patch_size"] = self.patch_size * self.spatial_merge_size
        return super()._process_images(images, **options)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        """What stands for one image in the prompt."""
        height, width = image_inputs["image_sizes"][image_idx]
        merged = self.patch_size * self.spatial_merge_size
        row = self.image_token * int(width // merged)
        return self.image_break_token.join([row] * int(height // merged)) + self.image_end_token

    @property
    def model_input_names(self) -> list[str]:
        """Names that the model takes."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "image_sizes"]
