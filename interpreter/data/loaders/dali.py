"""The ``dali`` loader: NVIDIA DALI decodes, resizes and flips frames, on a GPU or, with the same pipeline, on a CPU.

This is the only file that imports DALI, so everything else works without it.
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

# Samples of one run of a pipeline. This limits the number of native frames in memory.
SAMPLES = 64
# Frames of one sample of a video, for the same reason.
LONGEST_PIECE = 16
# Largest accepted mean absolute difference to PyAV, in levels of 255. Measured: 0.1 to 0.6 on real pictures, and 1.6 on
# blocks of random colours, because DALI interpolates chroma differently.
LARGEST_DIFFERENCE = 3.0


class _Sample(NamedTuple):
    """A file, and the frames to decode from it."""

    path: str
    frames: np.ndarray  # int32 [m]; a single image has one zero
    rows: np.ndarray  # where they go in the batch, int64 [m]
    flip: bool


class DaliLoader(ThreadedLoader):
    """Decode with DALI: nvJPEG and NVDEC on a GPU, libjpeg-turbo and FFmpeg on the CPU.

    Frames are resized with the same antialiased triangle filter as in the other loaders, but rounding differs, and at
    the borders the filter repeats pixels that Pillow leaves out. On the CPU, JPEG frames differ from `Video.read` by
    one level (more in the outermost pixels). Videos differ because chroma is interpolated differently, on real pictures
    by less than one level on average. One frame of each kind of video is compared at the start.

    Args:
        videos, size, device, ahead: see `Loader`; `dali_obstacle` checks whether DALI decodes them.
        workers: threads that decode.

    Raises:
        VideoError: if a video is damaged.
        LoaderError: if DALI decodes other frames than PyAV.
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
        """Compare the middle frame of the first video of each kind with the frame that PyAV decodes."""
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
                    f"DALI and PyAV differ in frame {middle} of {video.path}, by {difference:.1f} of 255 on average; "
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
            del self._pipelines[is_video]  # a pipeline of DALI cannot be used after an error
            if len(samples) > 1:  # DALI does not name the damaged file
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
        """Run a pipeline once. Returns DALI's list of uint8 [m, H, W, 3] or, for images, [H, W, 3]."""
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
        # Depth 1, because requests are already loaded ahead.
        pipeline = Pipeline(SAMPLES, self.workers, self._gpu, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.io.file.read(fn.external_source(name="paths", dtype=types.UINT8, ndim=1))
            flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
            if is_video:
                # Each sample has one flip, because fn.flip supports flips of single frames only if all sequences have
                # the same length.
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
    """The line of DALI's message that names the fault."""
    cause = re.search(r"encountered:\s*(?:Assert on .*? failed: )?(.+)", str(error))
    return cause[1].strip() if cause else " ".join(str(error).split())[:200]
