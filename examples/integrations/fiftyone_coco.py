"""Write COCO for FiftyOne, and compare every mask that its importer reads, pixel by pixel.

    python examples/integrations/fiftyone_coco.py clip.mp4 RUN OUT

The importer needs no database. To look at the result in the browser, use the database that fiftyone installs:

    dataset = fiftyone.Dataset.from_dir(
        dataset_dir="OUT/coco", dataset_type=fiftyone.types.COCODetectionDataset, label_types="segmentations"
    )
    fiftyone.launch_app(dataset)
"""

import sys
from pathlib import Path

import numpy as np
from fiftyone.utils.coco import COCODetectionDatasetImporter

import interpreter

clip, run, out = sys.argv[1:]

result = interpreter.segment_video(clip, run, out, formats=["coco"])

importer = COCODetectionDatasetImporter(str(Path(out, "coco")), label_types="segmentations", include_id=False)
count = 0
with importer:
    for (path, metadata, segments), labels in zip(importer, result.labels(), strict=True):
        assert Path(path).exists()
        assert (metadata.height, metadata.width) == labels.shape
        painted = np.zeros_like(labels)
        for detection in segments.detections:
            left, top, width, height = detection.bounding_box  # shares of the image
            rows, columns = round(top * metadata.height), round(left * metadata.width)
            place = painted[rows:, columns:][: detection.mask.shape[0], : detection.mask.shape[1]]
            place[detection.mask] = detection.track_id
            assert round(width * metadata.width) == detection.mask.shape[1]
            assert detection.label == "segment"
            count += 1
        assert (painted == labels + 1).all()
print(f"FiftyOne: {count} masks in {len(importer)} images read back, equal pixel by pixel")
