"""Names that options of commands choose from; importing them loads neither torch nor FFmpeg."""

from typing import Literal

DatasetKind = Literal["synthetic", "folder", "davis", "ytvis", "ytvos", "movi", "segtrack", "fbms"]
DavisAnnotations = Literal["unsupervised", "semi-supervised"]
LoaderName = Literal["auto", "dali", "pyav", "torch"]
Crop = Literal["none", "central", "random"]
