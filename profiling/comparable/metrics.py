"""Scores of segmentations: ours, and those of the code that published them."""

import json
import math
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco

from interpreter.metrics import PROTOCOLS, score_video
from interpreter.metrics.ari import ari_per_frame, ari_per_video
from interpreter.metrics.best_overlap import best_overlap_per_frame
from interpreter.metrics.contingency import contingency, ratio
from interpreter.metrics.miou import miou_per_frame
from interpreter.render.rle import RleWriter
from profiling.comparable.peers import Numbers, Peers
from profiling.comparable.videos import one_hot, one_object, video

SEMI = ("j", "j_recall", "j_decay", "f", "f_recall", "f_decay")
DAVIS_2017, DAVIS_2016 = "davisvideochallenge/davis2017-evaluation", "fperazzi/davis-2017"
STATISTICS = "HYOJINPARK/TTVOS"  # a copy of davis2017/utils.py
VIDEOSAUR, SLOT_CONTRAST = "martius-lab/videosaur", "ugadiarov-la-phystech-edu/slotcontrast"
OCLF, SAVI = "amazon-science/object-centric-learning-framework", "google-research/slot-attention-video"
YTVIS, YTVIS_FOLDER = "SysCV/MaskFreeVIS", "mask2former_video/data_video/datasets/ytvis_api"
SCALE = 5  # contours are compared within 1 to 3 pixels
COLUMNS = ("fg_ari_video", "mbo_video")


def _scores(protocol: str, pred: np.ndarray, true: np.ndarray, names: tuple[str, ...], **options: Any) -> np.ndarray:
    numbers = score_video(PROTOCOLS[protocol], pred, true, **options)
    return np.concatenate([np.atleast_1d(numbers[name]) for name in names])


def _masks(labels: np.ndarray, count: int) -> np.ndarray:
    """uint8 [count, T, H, W]: the objects 1 to ``count``, as DAVIS's code reads them."""
    return np.stack([labels == g for g in range(1, count + 1)]).astype(np.uint8)


def davis_2017_ours(case: int) -> np.ndarray:
    """J and F with recall and decay of each object."""
    pred, true = video(case, extra=0, scale=SCALE)
    return _scores("davis-2017", pred, true, SEMI, background=0)


def _davis(peers: Peers) -> dict[str, Any]:
    cv2, _ = peers.package("cv2", "opencv-python-headless")
    peers.package("skimage", "scikit-image")
    path, names = "davis2017/metrics.py", ("db_eval_iou", "db_eval_boundary", "f_measure", "_seg2bmap")
    return peers.definitions(DAVIS_2017, path, names, math=math, np=np, cv2=cv2)


def _davis_class(peers: Peers) -> Any:
    from scipy.optimize import linear_sum_assignment

    measures = _davis(peers)
    given = {name: measures[name] for name in ("db_eval_iou", "db_eval_boundary")}
    given |= {"np": np, "linear_sum_assignment": linear_sum_assignment, "_VOID_LABEL": 255}
    return peers.definitions(DAVIS_2017, "davis2017/evaluation.py", ("DAVISEvaluation",), **given)["DAVISEvaluation"]


def davis_2017(peers: Peers) -> tuple[str, Numbers]:
    """The official semi-supervised track."""
    import warnings

    official = _davis_class(peers)
    given = {"np": np, "warnings": warnings}
    statistics = peers.definitions(STATISTICS, "davis2017/utils.py", ("db_statistics",), **given)["db_statistics"]

    def numbers(case: int) -> np.ndarray:
        pred, true = (labels[1:-1] for labels in video(case, extra=0, scale=SCALE))
        count = int(video(case)[1][0].max())
        values = official._evaluate_semisupervised(_masks(true, count), _masks(pred, count), ("J", "F"))
        # One row for each object: mean, recall and decay of J, then of F; ours lists all objects of a number together.
        return np.concatenate([[statistics(row)[k] for row in part] for part in values for k in range(3)])

    return f"{peers.commit(DAVIS_2017)}, {peers.commit(STATISTICS)}", numbers


def davis_unsupervised_ours(case: int) -> np.ndarray:
    """J and F of each object, sorted, because the official code lists objects by proposal."""
    pred, true = video(case, scale=SCALE)
    rows = [_scores("davis-2017-unsupervised", pred, true, (name,), background=0) for name in ("j", "f")]
    return np.concatenate([np.sort(row) for row in rows])


def davis_unsupervised(peers: Peers) -> tuple[str, Numbers]:
    """The official unsupervised track."""
    official = _davis_class(peers)

    def numbers(case: int) -> np.ndarray:
        pred, true = video(case, scale=SCALE)
        objects, proposals = _masks(true, int(true[0].max())), _masks(pred, int(pred.max()))
        values = official._evaluate_unsupervised(objects, proposals, ("J", "F"))
        return np.concatenate([np.sort(part.mean(axis=1)) for part in values])

    return peers.commit(DAVIS_2017), numbers


def davis_void_ours(case: int) -> np.ndarray:
    """J and F of one object, void pixels left out."""
    return _scores("davis-2017-unsupervised", *one_object(case, void=True, scale=SCALE), ("j", "f"), background=0)


def davis_void(peers: Peers) -> tuple[str, Numbers]:
    """The official J and F with void pixels."""
    official = _davis(peers)

    def numbers(case: int) -> np.ndarray:
        pred, true = one_object(case, void=True, scale=SCALE)
        arguments = true == 1, pred == 1, true == 255
        return np.array([official[name](*arguments).mean() for name in ("db_eval_iou", "db_eval_boundary")])

    return peers.commit(DAVIS_2017), numbers


def davis_2016_ours(case: int) -> np.ndarray:
    """J and F of the foreground."""
    return _scores("davis-2016", *one_object(case, scale=SCALE), ("j", "f"), background=0)


def davis_2016(peers: Peers) -> tuple[str, Numbers]:
    """The official J and F of DAVIS-2016."""
    peers.package("skimage", "scikit-image")
    folder = "python/lib/davis/measures"
    region = peers.definitions(DAVIS_2016, f"{folder}/jaccard.py", ("db_eval_iou",), np=np)["db_eval_iou"]
    names = ("db_eval_boundary", "seg2bmap")
    boundary = peers.definitions(DAVIS_2016, f"{folder}/f_boundary.py", names, np=np)["db_eval_boundary"]

    def numbers(case: int) -> np.ndarray:
        pred, true = (labels[1:-1] > 0 for labels in one_object(case, scale=SCALE))
        frames = list(zip(pred, true, strict=True))
        return np.array([np.mean([region(t, p) for p, t in frames]), np.mean([boundary(p, t) for p, t in frames])])

    return peers.commit(DAVIS_2016), numbers


def videosaur_ours(case: int) -> np.ndarray:
    """FG-ARI and mBO of whole videos, and of clips of six frames."""
    pred, true = video(case)
    return np.concatenate([_scores(name, pred, true, COLUMNS) for name in ("slot-contrast", "videosaur")])


def videosaur(peers: Peers) -> tuple[str, Numbers]:
    """VideoSAUR's FG-ARI and mBO, for the same parts of the video."""
    names = ("adjusted_rand_index", "intersection_over_union_with_matching", "intersection_over_union")
    given = {"torch": torch}
    code = peers.definitions(VIDEOSAUR, "videosaur/metrics.py", (*names, "confusion_matrix"), **given)

    def scores(pred: np.ndarray, true: np.ndarray) -> list[float]:
        objects, segments = one_hot(true, range(1, 6))[None], one_hot(pred, range(16))[None]
        ious = code["intersection_over_union_with_matching"](objects, segments, "overlap")
        seen = objects.any(1).sum()
        return [code["adjusted_rand_index"](objects, segments).item(), (ious.sum() / seen).item()]

    def numbers(case: int) -> np.ndarray:
        pred, true = video(case)
        clips = [scores(pred[t : t + 6], true[t : t + 6]) for t in (0, 6)]
        return np.concatenate([scores(pred, true), np.transpose(clips).ravel()])

    return peers.commit(VIDEOSAUR), numbers


def videosaur_f_ours(case: int) -> np.ndarray:
    """F of DAVIS of one object, over all frames."""
    return _scores("davis-2017-unsupervised", *one_object(case), ("f",), background=0)


def videosaur_f(peers: Peers) -> tuple[str, Numbers]:
    """The F in VideoSAUR's J&F."""
    einops, _ = peers.package("einops", "einops")
    names = ("confusion_matrix", "boundary_f_measure", "f_measure", "masks_to_boundaries")
    code = peers.definitions(VIDEOSAUR, "videosaur/metrics.py", names, torch=torch, einops=einops, math=math)

    def numbers(case: int) -> np.ndarray:
        pred, true = (torch.from_numpy(labels > 0)[:, None].float() for labels in one_object(case))
        return np.array([code["boundary_f_measure"](true, pred)[0].mean().item()])

    return peers.commit(VIDEOSAUR), numbers


def video_ari_ours(case: int) -> np.ndarray:
    """FG-ARI of a video."""
    return np.array([ari_per_video(contingency(*video(case)))])


def slot_contrast(peers: Peers) -> tuple[str, Numbers]:
    """FG-ARI of a fork of Slot Contrast."""
    given = {"torch": torch, "METRIC_DTYPE": torch.float64}
    code = peers.definitions(SLOT_CONTRAST, "slotcontrast/metrics.py", ("adjusted_rand_index",), **given)

    def numbers(case: int) -> np.ndarray:
        pred, true = video(case)
        ari = code["adjusted_rand_index"](one_hot(true, range(1, 6))[None], one_hot(pred, range(16))[None])
        return np.asarray(ari.numpy())

    return peers.commit(SLOT_CONTRAST), numbers


def frames_ours(case: int) -> np.ndarray:
    """FG-ARI, mBO and mIoU per frame."""
    table = contingency(*video(case))
    return np.array([ari_per_frame(table), best_overlap_per_frame(table), miou_per_frame(table)])


def oclf(peers: Peers) -> tuple[str, Numbers]:
    """OCLF's FG-ARI, mBO and mIoU (Hungarian match) of the frames that have objects."""
    import scipy.optimize

    names = ("adjusted_rand_index", "fg_adjusted_rand_index")
    ari = peers.definitions(OCLF, "ocl/metrics/utils.py", names, torch=torch)["fg_adjusted_rand_index"]
    given = {"torch": torch, "scipy": scipy}
    iou = peers.definitions(OCLF, "ocl/metrics/masks.py", ("unsupervised_mask_iou",), **given)["unsupervised_mask_iou"]

    def numbers(case: int) -> np.ndarray:
        rows = []
        for pred, true in zip(*video(case), strict=True):
            objects, segments = one_hot(true, range(6)), one_hot(pred, range(16)).float()
            if not (seen := objects[:, 1:].any(0)).any():
                continue
            masks = segments.T, objects[:, 1:].T[seen]
            means = [iou(*masks, matching=matching) for matching in ("best_overlap", "hungarian")]
            rows.append([ari(segments[None], objects[None]).item(), *(mean.item() for mean in means)])
        return np.mean(rows, axis=0)

    return peers.commit(OCLF), numbers


def savi_in(double: bool) -> Any:
    """SAVi's FG-ARI of a video in float32, as SAVi runs it, or in float64."""

    def savi(peers: Peers) -> tuple[str, Numbers]:
        import typing

        jax, version = peers.package("jax", "jax")
        given = {"jax": jax, "jnp": jax.numpy, "Ndarray": typing.Any, "Optional": typing.Optional}
        code = peers.definitions(SAVI, "savi/lib/metrics.py", ("adjusted_rand_index",), **given)

        def numbers(case: int) -> np.ndarray:
            pred, true = (jax.numpy.asarray(labels[None].astype(np.int32)) for labels in video(case))
            jax.config.update("jax_enable_x64", double)
            ari = code["adjusted_rand_index"](true, pred, 6, 16, ignore_background=True)
            jax.config.update("jax_enable_x64", False)
            return np.asarray(ari, np.float64)

        return f"{peers.commit(SAVI)}, {version}", numbers

    return savi


def frame_ari_ours(case: int) -> np.ndarray:
    """FG-ARI per frame."""
    return np.array([ari_per_frame(contingency(*video(case)))])


def scikit_ari(peers: Peers) -> tuple[str, Numbers]:
    """adjusted_rand_score of the foreground pixels of each frame."""
    metrics, version = peers.package("sklearn.metrics", "scikit-learn")

    def numbers(case: int) -> np.ndarray:
        frames = [(p[t > 0], t[t > 0]) for p, t in zip(*video(case), strict=True) if t.any()]
        return np.array([np.mean([metrics.adjusted_rand_score(true, pred) for pred, true in frames])])

    return version, numbers


def volume_ours(case: int) -> np.ndarray:
    """IoU of every segment with every object, the video taken as one volume."""
    intersection, union = contingency(*video(case)).intersection_and_union()
    return np.asarray(ratio(intersection.sum(axis=0), union.sum(axis=0)).ravel())


def ytvis(peers: Peers) -> tuple[str, Numbers]:
    """The same from the YouTube-VIS API, which reads the masks of segments.json against its own ground truth."""
    import copy
    import itertools
    import sys
    import time
    from collections import defaultdict

    given = {"json": json, "time": time, "np": np, "copy": copy, "itertools": itertools, "maskUtils": coco}
    given |= {"defaultdict": defaultdict, "PYTHON_VERSION": sys.version_info[0]}
    api = peers.definitions(YTVIS, f"{YTVIS_FOLDER}/ytvos.py", ("_isArrayLike", "YTVOS"), **given)["YTVOS"]
    judge = peers.definitions(YTVIS, f"{YTVIS_FOLDER}/ytvoseval.py", ("YTVOSeval",), **given)["YTVOSeval"]

    def numbers(case: int) -> np.ndarray:
        pred, true = video(case)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            results, index = Path(folder) / "segments.json", Path(folder) / "train.json"
            with RleWriter(results) as writer:
                for labels in pred:
                    writer.write(7, labels)
            index.write_text(json.dumps(_ground_truth(true)))
            truth = api(str(index))
            evaluation = judge.__new__(judge)
            evaluation.cocoGt, evaluation.cocoDt = truth, truth.loadRes(str(results))
            settings = {"useCats": 0, "vidIds": [7], "catIds": [1], "iouType": "segm", "maxDets": [100]}
            evaluation.params = SimpleNamespace(**settings)
            evaluation._prepare()
            return np.asarray(evaluation.computeIoU(7, -1).ravel())

    return peers.commit(YTVIS), numbers


def _ground_truth(true: np.ndarray) -> dict[str, Any]:
    """A YouTube-VIS index of one video, number 7."""
    annotations = []
    for label in range(1, int(true.max()) + 1):
        codes = [coco.encode(np.asfortranarray(frame == label).view(np.uint8)) for frame in true]
        tracks = [{"size": code["size"], "counts": code["counts"].decode()} for code in codes]
        areas = [int(coco.area(code)) for code in codes]
        entry = {"id": label, "video_id": 7, "category_id": 1, "iscrowd": 0, "areas": areas}
        annotations.append(entry | {"segmentations": [t if a else None for t, a in zip(tracks, areas, strict=True)]})
    videos = [{"id": 7, "height": true.shape[1], "width": true.shape[2], "length": len(true)}]
    return {"videos": videos, "categories": [{"id": 1, "name": "object"}], "annotations": annotations}
