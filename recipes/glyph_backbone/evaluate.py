"""Check the shipped weights: nearest class mean on their features against the same on raw pixels."""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

Arrays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]


def load_features(weights: Path) -> tuple[VisionTransformer, float, float]:
    """Build the feature extractor, and return it with the mean and deviation of its pixels."""
    description = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    model = VisionTransformer(**description["architecture"], num_classes=0)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    config = description["pretrained_cfg"]
    return model.eval(), config["mean"][0], config["std"][0]


def enlarge(image: Image.Image) -> NDArray[np.float32]:
    """Turn a grey picture into 32x32 pixels in [0, 1]."""
    return np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255


def read_digits(seed: int) -> Arrays:
    """Read scikit-learn's digits, a stratified fifth of them for testing."""
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.stack([enlarge(Image.fromarray(image)) for image in grey])
    labels = digits.target.astype(np.int64)
    return tuple(train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed))


def read_glyphs(path: Path) -> Arrays:
    """Read glyphs100 with the split it comes with."""
    with pa.memory_map(str(path)) as source:
        rows = pa.ipc.open_file(source).read_all().to_pydict()
    images = np.stack([enlarge(Image.open(io.BytesIO(image))) for image in rows["image"]])
    labels = np.unique(rows["label"], return_inverse=True)[1].astype(np.int64)
    test = np.array(rows["split"]) == "test"
    return images[~test], images[test], labels[~test], labels[test]


def score_nearest_mean(train: Tensor, test: Tensor, labels: Tensor, truth: Tensor) -> float:
    """Classify vectors of unit length by the nearest of the classes' means, and return the accuracy."""
    train, test = train / train.norm(dim=1, keepdim=True), test / test.norm(dim=1, keepdim=True)
    means = torch.stack([train[labels == label].mean(0) for label in labels.unique()])
    return (torch.cdist(test, means).argmin(1) == truth).float().mean().item()


@torch.inference_mode()
def evaluate(weights: Path, glyphs: Path, seed: int) -> dict[str, dict[str, float]]:
    """Score features and pixels on both data sets."""
    model, mean, std = load_features(weights)
    scores = {}
    for name, arrays in (("digits", read_digits(seed)), ("glyphs100", read_glyphs(glyphs))):
        train, test, labels, truth = (torch.from_numpy(array) for array in arrays)
        features = [
            torch.cat([model((part.unsqueeze(1) - mean) / std) for part in images.split(512)])
            for images in (train, test)
        ]
        scores[name] = {
            "features": round(score_nearest_mean(features[0], features[1], labels, truth), 4),
            "pixels": round(score_nearest_mean(train.flatten(1), test.flatten(1), labels, truth), 4),
            "train": len(train),
            "test": len(test),
        }
    return scores


def main() -> None:
    """Read the command line and print the scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=Path("sdlora/weights/glyph_vit.safetensors"))
    parser.add_argument(
        "--glyphs", type=Path, default=Path("pipelines/data/embedded/glyphs100/glyphs100.arrow")
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the digits' split")
    arguments = parser.parse_args()
    print(json.dumps(evaluate(arguments.weights, arguments.glyphs, arguments.seed), indent=1))


if __name__ == "__main__":
    main()
