"""The ``dali`` loader: NVIDIA DALI decodes, resizes and flips, on the GPU or, the same pipeline, on the CPU.

The only file that imports DALI, so that everything else works without it.
"""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from interpreter.data.loaders.base import LoaderError, Piece, Request, ThreadedLoader, split
from interpreter.data.video import FrameFolder, Size, Video, VideoError

# Samples of one run of a pipeline: bounds the native frames that are in memory at once.
SAMPLES = 64
# Frames of one sample of a video, likewise.
LONGEST_PIECE = 16
# Mean absolute difference to PyAV, in levels of 255, above which frames are not the same. Measured: 0.1 to
# 0.6 on real pictures, 1.6 on blocks of random colours, whose chroma is interpolated differently.
LARGEST_DIFFERENCE = 3.0


class _Sample(NamedTuple):
    """A file, and the frames to decode from it."""

    path: str
    frames: np.ndarray  # int32 [m]; of a single image one zero
    rows: np.ndarray  # where they go in the batch, int64 [m]
    flip: bool


class DaliLoader(ThreadedLoader):
    """Decode with DALI: nvJPEG and NVDEC on a GPU, libjpeg-turbo and FFmpeg on the CPU.

    Frames are resized with the same antialiased triangle filter as elsewhere, but rounded otherwise, and at the borders
    it repeats pixels where Pillow leaves them out. On the CPU, JPEG frames differ from `Video.read` by one level, in
    the outermost pixels by more; videos by another interpolation of chroma, under one level in the mean on real
    pictures. One frame of each kind of video is compared at the start.

    Args:
        videos, size, device, ahead: see `Loader`; `dali_obstacle` tells which videos DALI decodes.
        workers: threads that decode.

    Raises:
        VideoError: if a video is damaged.
        LoaderError: if DALI finds other frames than PyAV does.
    """

    name = "dali"

    def __init__(self, videos: Sequence[Video], size: Size, device: torch.device, ahead: int, workers: int) -> None:
        super().__init__(videos, size, device, ahead)
        self.workers = workers
        self._gpu = self.device.index if device.type == "cuda" else None
        self._pipelines: dict[bool, Pipeline] = {}  # by whether they decode videos
        try:
            self._compare()
        except BaseException:
            self.close()
            raise

    def _compare(self) -> None:
        """Compare the middle frame of the first video of each kind with PyAV's."""
        kinds: dict[object, int] = {}
        for index, video in enumerate(self.videos):
            if not isinstance(video, FrameFolder):
                kinds.setdefault((getattr(video, "codec", None), video.path.suffix.lower()), index)
        for index in kinds.values():
            video = self.videos[index]
            middle = video.num_frames // 2
            pixels = self.batch(torch.tensor([self.index.starts[index] + middle]), torch.tensor([False])).cpu().numpy()
            difference = np.abs(pixels.astype(float) - video.read([middle], self.size)).mean()
            if difference > LARGEST_DIFFERENCE:
                raise LoaderError(
                    f"DALI and PyAV differ in frame {middle} of {video.path}, by {difference:.1f} of 255 in the mean; "
                    "use --loader pyav"
                )

    def _load(self, request: Request) -> Tensor:
        pieces = split(request, self.index, LONGEST_PIECE)
        pixels = torch.empty(len(request.frames), *self.size, 3, dtype=torch.uint8, device=self.device)
        for is_video in (False, True):
            samples = [
                sample
                for piece in pieces
                if isinstance(self.videos[piece.video], FrameFolder) != is_video
                for sample in self._samples(piece)
            ]
            for first in range(0, len(samples), SAMPLES):
                self._decode(samples[first : first + SAMPLES], is_video, pixels)
        return pixels

    def _samples(self, piece: Piece) -> list[_Sample]:
        video = self.videos[piece.video]
        if isinstance(video, FrameFolder):
            one = np.zeros(1, np.int32)
            files = zip(piece.frames, piece.rows, strict=True)
            return [_Sample(str(video.files[t]), one, np.array([row]), piece.flip) for t, row in files]
        return [_Sample(str(video.path), piece.frames.astype(np.int32), piece.rows, piece.flip)]

    def _decode(self, samples: list[_Sample], is_video: bool, pixels: Tensor) -> None:
        """Write the frames of samples into their rows of ``pixels``."""
        try:
            outputs = self._run(samples, is_video)
        except RuntimeError as error:
            del self._pipelines[is_video]  # DALI's pipelines do not survive an error
            if len(samples) > 1:  # DALI does not say which of them it was
                for sample in samples:
                    self._decode([sample], is_video, pixels)
                raise LoaderError(
                    f"DALI fails on {len(samples)} files, {samples[0].path} and others, though not on each alone "
                    f"({_reason(error)}); use --loader pyav"
                ) from error
            raise VideoError(
                f"{samples[0].path}: DALI cannot decode it ({_reason(error)}); restore the file, or use --loader pyav"
            ) from error
        for place, sample in enumerate(samples):
            frames = torch.empty(len(sample.rows), *self.size, 3, dtype=torch.uint8, device=pixels.device)
            feed_ndarray(outputs[place], frames if is_video else frames[0], cuda_stream=self._stream)
            pixels[torch.from_numpy(sample.rows).to(pixels.device)] = frames

    def _run(self, samples: list[_Sample], is_video: bool) -> Any:
        """Run a pipeline once; returns DALI's list of uint8 [m, H, W, 3] or, of images, [H, W, 3]."""
        if is_video not in self._pipelines:
            self._pipelines[is_video] = self._build(is_video)
        pipeline = self._pipelines[is_video]
        pipeline.feed_input("paths", [np.frombuffer(os.fsencode(sample.path), np.uint8) for sample in samples])
        pipeline.feed_input("flips", [np.array(sample.flip, np.int32) for sample in samples])
        if is_video:
            pipeline.feed_input("frames", [sample.frames for sample in samples])
        return pipeline.run()[0]

    def _build(self, is_video: bool) -> Pipeline:
        decoder = "cpu" if self._gpu is None else "mixed"
        # A depth of one: requests are loaded ahead already.
        pipeline = Pipeline(SAMPLES, self.workers, self._gpu, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.io.file.read(fn.external_source(name="paths", dtype=types.UINT8, ndim=1))
            flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
            if is_video:
                # Each sample of one flip, since fn.flip takes per-frame flips only for sequences of one length.
                numbers = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
                native = fn.decoders.video(encoded, frames=numbers, pad_mode="none", device=decoder)
            else:
                native = fn.decoders.image(
                    encoded, output_type=types.RGB, jpeg_fancy_upsampling=True, use_fast_idct=False, device=decoder
                )
            frames = fn.resize(native, size=self.size, interp_type=types.INTERP_TRIANGULAR, antialias=True)
            pipeline.set_outputs(fn.flip(frames, horizontal=flips))
        pipeline.build()
        return pipeline

    def close(self) -> None:
        """See `Loader.close`."""
        super().close()
        self._pipelines.clear()


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's message that says what went wrong."""
    cause = re.search(r"encountered:\s*(?:Assert on .*? failed: )?(.+)", str(error))
    return cause[1].strip() if cause else " ".join(str(error).split())[:200]
