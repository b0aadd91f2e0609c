"""Stands where a processor wants a video processor, which would need torchvision."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from transformers.video_processing_utils import VideoProcessorMixin

from .opening import refuse_video


class NoVideo(VideoProcessorMixin):
    """Refuses videos; keeps the settings of the video processor, so that a saved folder loses nothing."""

    num_frames: int | None = None
    fps: float | None = None

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._settings = settings

    def __call__(self, videos: Any, **options: Any) -> NoReturn:
        refuse_video()

    def to_dict(self) -> dict[str, Any]:
        """The settings as they were read."""
        return copy.deepcopy(self._settings)
