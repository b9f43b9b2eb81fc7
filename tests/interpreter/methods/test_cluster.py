"""The method cluster, which needs no run."""

import pytest
import torch

from interpreter.configs import BackboneConfig
from interpreter.methods import cluster
from interpreter.methods.cluster import ClusterSettings, open_clusters
from interpreter.models.backbones import load_backbone


@pytest.mark.parametrize(("patch", "side"), [(14, 420), (16, 416), (32, 416), (8, 416), (500, 500)])
def test_frames_fit_the_patches_of_every_backbone(monkeypatch, patch, side):
    def load(config):
        backbone = load_backbone(config)
        backbone.patch = patch
        return backbone

    monkeypatch.setattr(cluster, "load_backbone", load)
    settings = ClusterSettings(backbone=BackboneConfig("efficientnet-lite0"))
    segmenter = open_clusters(torch.device("cpu"), settings, None)
    assert segmenter.frame_size == (side, side)
    assert segmenter.grid == (side // patch, side // patch)
    assert open_clusters(torch.device("cpu"), settings, (2 * patch, patch)).grid == (2, 1)


def test_name_of_a_backbone_is_enough():
    assert ClusterSettings(backbone="efficientnet-lite0") == ClusterSettings(backbone=BackboneConfig())
    with pytest.raises(ValueError, match=r'backbone=5: give a name, such as "efficientnet-lite0"'):
        ClusterSettings(backbone=5)
