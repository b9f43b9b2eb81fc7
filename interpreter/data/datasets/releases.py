"""Where to download the published data sets, and their layouts on disk."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """Download locations and layout of a data set.

    Attributes:
        title: its name and paper.
        locations: where to get it, one line each.
        tree: the required layout below the root.
        splits: values of ``split`` in `open_dataset`; None if there are no splits.
    """

    title: str
    locations: tuple[str, ...]
    tree: str
    splits: tuple[str | None, ...] = (None,)

    def instructions(self) -> str:
        """How to get the data, as text."""
        return "\n".join(
            [self.title, "", "Get it:", *(f"  {line}" for line in self.locations), "", "Layout:", self.tree]
        )


RELEASES = {
    "ytvis": Release(
        "YouTube-VIS 2019 or 2021 (Yang et al., ICCV 2019)",
        (
            "https://youtube-vos.org/dataset/vis/ (registration; train.zip, valid.zip, test.zip and the JSON files)",
            "2019: https://competitions.codalab.org/competitions/20128",
            "2021: https://competitions.codalab.org/competitions/28988",
        ),
        """  ROOT/train.json                          (or ROOT/train/instances.json)
  ROOT/train/JPEGImages/0043f083b5/00000.jpg …
  ROOT/valid.json, ROOT/valid/JPEGImages/… (optional; their masks are not public)
  ROOT/test.json,  ROOT/test/JPEGImages/…  (optional)""",
        ("train", "holdout", "valid", "test"),
    ),
    "ytvos": Release(
        "YouTube-VOS 2018 or 2019 (Xu et al., ECCV 2018)",
        ("https://youtube-vos.org/dataset/vos/ (registration; train.zip, valid.zip, test.zip, and *_all_frames.zip)",),
        """  ROOT/train/JPEGImages/003234408d/00000.jpg …
  ROOT/train/Annotations/003234408d/00000.png …      (optional)
  ROOT/train/meta.json                               (optional)
  ROOT/valid/…, ROOT/test/…                          (likewise; masks of the frames where an object appears first)
  ROOT/train_all_frames/JPEGImages/…                 (30 frames per second; likewise valid_all_frames, …)""",
        ("train", "valid", "test", "train_all_frames", "valid_all_frames", "test_all_frames"),
    ),
    "davis": Release(
        "DAVIS 2016 (Perazzi et al., CVPR 2016) and 2017 (Pont-Tuset et al. 2017, Caelles et al. 2019)",
        (
            "https://davischallenge.org",
            "2017 unsupervised: "
            "https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-Unsupervised-trainval-480p.zip",
            "2017 semi-supervised: https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-trainval-480p.zip",
            "2016: https://graphics.ethz.ch/Downloads/Data/Davis/DAVIS-data.zip",
        ),
        """  ROOT/ImageSets/2016/{train,val}.txt, ROOT/ImageSets/2017/{train,val}.txt
  ROOT/JPEGImages/480p/bear/00000.jpg …
  ROOT/Annotations/480p/bear/00000.png …               (2016, and 2017 semi-supervised)
  ROOT/Annotations_unsupervised/480p/bear/00000.png …  (2017 unsupervised)""",
        ("train", "val"),
    ),
    "movi": Release(
        "MOVi-C, MOVi-D and MOVi-E (Greff et al., CVPR 2022), 256x256, 24 frames",
        (
            "gsutil -m cp -r gs://kubric-public/tfds/movi_e/256x256 DOWNLOAD   (likewise movi_c, movi_d)",
            "https://github.com/google-research/kubric/tree/main/challenges/movi",
            "then: python -m interpreter.data convert movi --root DOWNLOAD --out ROOT",
        ),
        """  DOWNLOAD/256x256/1.0.0/{dataset_info.json,features.json,movi_e-train.tfrecord-00000-of-01024 …}
  ROOT/ImageSets/2017/{train,validation,test}.txt       (written by convert)
  ROOT/JPEGImages/480p/train-00000/00000.png …
  ROOT/Annotations_unsupervised/480p/train-00000/00000.png …""",
        ("train", "validation", "test"),
    ),
    "segtrack": Release(
        "SegTrack-v2 (Li et al., ICCV 2013)",
        (
            "https://web.engr.oregonstate.edu/~lif/SegTrack2/SegTrackv2.zip",
            "https://web.engr.oregonstate.edu/~lif/SegTrack2/dataset.html",
        ),
        """  ROOT/JPEGImages/birdfall/*.{png,bmp,jpg}
  ROOT/GroundTruth/birdfall/*.{png,bmp}      (one object)
  ROOT/GroundTruth/bmx/{1,2}/*.{png,bmp}     (a folder for each object)""",
    ),
    "fbms": Release(
        "FBMS-59 (Ochs, Malik and Brox, PAMI 2014)",
        (
            "https://lmb.informatik.uni-freiburg.de/resources/datasets/fbms/FBMS_Trainingset.zip",
            "https://lmb.informatik.uni-freiburg.de/resources/datasets/fbms/FBMS_Testset.zip",
            "https://lmb.informatik.uni-freiburg.de/resources/datasets/moseg.en.html",
        ),
        """  ROOT/Trainingset/bear01/bear01_0001.jpg …
  ROOT/Trainingset/bear01/GroundTruth/bear01Def.dat
  ROOT/Trainingset/bear01/GroundTruth/bear01_0001_gt.ppm …  (or .pgm; few frames have one)
  ROOT/Testset/…                                            (likewise)""",
        ("train", "test"),
    ),
    "synthetic": Release(
        "Generated scenes",
        ("python -m interpreter.data.synthetic --root ROOT --split train",),
        "  ROOT in the DAVIS 2017 layout, written by that command",
        ("train", "val"),
    ),
    "folder": Release(
        "Your own videos",
        ("copy them to ROOT",),
        """  ROOT/any/depth/clip.mp4, ROOT/any/depth/clip/00000.jpg …   (or .jpeg, .png, .bmp, .webp)
  ROOT/masks/any/depth/clip/00000.png …      (optional: object ids, 255 is void)
or
  ROOT/JPEGImages/clip/00000.jpg …
  ROOT/Annotations/clip/00000.png …          (optional)""",
    ),
}
