"""The order in which a caller runs each method's programs over a video. Exported runs are compared with it."""

import torch

from interpreter.engine.randomness import torch_generator

SEED = 0


def drawn(*shape, generator=None):
    """The noise that the segmenters draw for the seed 0."""
    return torch.randn(shape, generator=generator or torch_generator(torch.device("cpu"), SEED))


def interpreter(programs, features, segmenter):
    """Image slots of all frames, then video slots; masks of the video slots that exist, [T, M, S]."""
    image, video = segmenter.image_stage.config, segmenter.video_stage.config
    generator = torch_generator(torch.device("cpu"), SEED, 0)
    shape = (len(features), 2 * image.num_slots, image.dim)
    noise = torch.stack([drawn(*shape, generator=generator) for _ in range(image.restarts)])
    slots, attention, means = programs["image_stage"](features, noise)
    generator = torch_generator(torch.device("cpu"), SEED, 1)
    noise = torch.stack([drawn(video.num_slots, video.dim, generator=generator) for _ in range(video.restarts)])
    inputs = means if video.inputs == "means" else slots
    _, _, valid, masks = programs["video_stage"](inputs, attention, noise)
    return masks[..., valid]


def dinosaur(programs, features, segmenter):
    """Masks of each frame by itself."""
    config = segmenter.model.config
    noise = drawn(1, config.num_slots, config.dim).expand(len(features), -1, -1)
    return programs["model"](features, noise)[1]


def recurrent(programs, features, segmenter):
    """Frame by frame; each starts from the slots of the frame before."""
    shape = segmenter.model.initial.noise_shape
    start = () if shape is None else (drawn(1, *shape)[0],)
    _, first, state = programs["first_frame"](features[:1], *start)
    masks = [first]
    for frame in features[1:]:
        _, found, state = programs["next_frame"](frame[None], state)
        masks.append(found)
    return torch.cat(masks)


def solv(programs, features, segmenter):
    """Slots of each frame, then those of a window around each frame."""
    slots, attention = programs["bind"](features)
    half, count = segmenter.model.num_frames // 2, len(features)
    frames = torch.arange(count)[:, None] + torch.arange(-half, half + 1)
    present = (frames >= 0) & (frames < count)
    return programs["decode"](slots[frames.clamp(0, count - 1)], present, attention)[2]


def smtc(programs, features, segmenter):
    """Each frame with the frame before it; the first frame with the second."""
    config = segmenter.model.config.model
    noise = drawn(1, config.num_semantics, config.num_instances, segmenter.model.student.dim)
    partners = torch.cat([features[1:2], features[:-1]])
    return programs["model"](features, partners, noise.expand(len(features), -1, -1, -1))[3]


CHAINS = {
    "interpreter": interpreter,
    "dinosaur": dinosaur,
    "slot-contrast": recurrent,
    "videosaur": recurrent,
    "solv": solv,
    "smtc": smtc,
}
