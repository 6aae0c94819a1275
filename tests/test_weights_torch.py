"""PyTorch's files, written by PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import vgg_files
from vgg_files import BATCH_NORM_SPEC, BODY_SPEC, NAMES, SPEC

from accel import weights
from accel.weights import WeightError

torch = pytest.importorskip("torch")


def torch_vgg(*, batch_norm: bool):
    """torchvision's VGG with the widths of ``vgg_files``, in evaluation mode."""
    nn = torch.nn
    torch.manual_seed(0)
    layers = []
    in_channels = 3
    for name, channels in zip(NAMES, vgg_files.WIDTHS, strict=True):
        layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
        if batch_norm:
            norm = nn.BatchNorm2d(channels)
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(0, 0.1)
            layers.append(norm)
        layers.append(nn.ReLU(inplace=True))
        if name in ("1_2", "2_2", "3_3"):
            layers.append(nn.MaxPool2d(2, 2))
        in_channels = channels
    hidden = vgg_files.HIDDEN
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(*layers))
    model.add_module("avgpool", nn.AdaptiveAvgPool2d(vgg_files.POOLED_SIZE))
    model.add_module("flatten", nn.Flatten())
    classifier = nn.Sequential(
        nn.Linear(in_channels * vgg_files.POOLED_SIZE**2, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, vgg_files.CLASSES),
    )
    model.add_module("classifier", classifier)
    # PyTorch's own initial weights let the signal die away, and the output would be the last bias.
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("size", [16, 37])
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_gives_pytorchs_output(batch_norm, size, zipped, tmp_path):
    model = torch_vgg(batch_norm=batch_norm)
    path = tmp_path / "vgg.pth"
    # torchvision's published files are of the older kind.
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        features = model.features[:-1](torch.tensor(images.transpose(0, 3, 1, 2))).numpy()

    loaded = weights.load(path, BATCH_NORM_SPEC if batch_norm else SPEC)
    np.testing.assert_allclose(loaded(images), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        loaded.features(images), features.transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4
    )


def test_bfloat16_is_widened(tmp_path):
    model = torch_vgg(batch_norm=False).bfloat16()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    kernel = weights.load(tmp_path / "a.pt", BODY_SPEC).conv1_1.kernel[...]
    expected = model.features[0].weight.detach().float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)


def test_other_content_than_a_state_dict(tmp_path):
    model = torch_vgg(batch_norm=False)
    for content, message in [
        ({"state_dict": model.state_dict()}, "entry 'state_dict': expected a tensor, found .*Dict"),
        ([1, 2], "expected a dictionary of tensors, found list"),
        (model, "expected a state dict of tensors"),
    ]:
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(WeightError, match=rf"a\.pth: {message}"):
            weights.load(tmp_path / "a.pth", SPEC)
