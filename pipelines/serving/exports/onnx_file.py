"""Export `onnx`: one file for ONNX Runtime and whatever else reads it, any number of images at a time."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.serving.exports.subject import Subject, batches

if TYPE_CHECKING:
    import onnx
    from PIL.Image import Image
    from torch import Tensor, nn

_FILE = "model.onnx"
_LARGE = 1_500_000_000
"""Bytes of weights beyond which they lie in a file of their own: one protocol buffer ends at 2 GiB."""


def write(folder: Path, subject: Subject) -> None:
    """Leave model.onnx, with the carried facts in its metadata too, and the carried files.

    Where the step has a threshold for unknown images, their score is a second output, and the threshold stands in the
    metadata.
    """
    import onnx

    from sdlora.loading import inference_model, scored_model

    step = subject.step()
    rejection = step.learned.rejection
    model = scored_model(step) if rejection else inference_model(step)
    outputs = ["logits", "score"] if rejection else ["logits"]
    proto = _convert(model, subject.preprocessing.input_size, outputs)
    facts: dict[str, Any] = {
        "classes": step.classes,
        "preprocessing": subject.described_preprocessing(),
        "ledger": {key: value for key, value in subject.described_ledger(step).items() if key != "record"},
    }
    if rejection:
        facts["unknown"] = {"score": rejection.score, "threshold": rejection.threshold}
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=json.dumps(value, sort_keys=True, ensure_ascii=False))
    large = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) > _LARGE
    onnx.save_model(
        proto, str(folder / _FILE), save_as_external_data=large, location=f"{_FILE}.data" if large else None
    )
    subject.carry(folder, step)


def _convert(model: nn.Module, input_size: tuple[int, int, int], outputs: list[str]) -> onnx.ModelProto:
    """Return the graph of a model: `images` (batch, channels, height, width) float32 → `logits` (batch, classes), and
    `score` (batch,) where it is among the outputs.

    Nothing of the machine stays in it: torch writes the paths of its sources beside every node.
    """
    import torch

    for module in model.modules():
        # torch's own decomposition of fused attention fails where there is a bias of relative positions.
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    with _quiet():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *input_size),),  # one image would be taken for a constant
            dynamo=True,
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for node in [proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.functions]:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for function in proto.functions:
        for node in function.node:
            del node.metadata_props[:]
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While torch converts, keep back its notes on folded constants and its own deprecations."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def logits(folder: Path, subject: Subject, pictures: Sequence[Image]) -> Tensor:
    """Logits (n, classes) by ONNX Runtime: the first picture alone, three together, then many."""
    return _run(folder, subject, pictures, "logits")


def scores(folder: Path, subject: Subject, pictures: Sequence[Image]) -> Tensor:
    """Scores (n,) for unknown images by ONNX Runtime."""
    return _run(folder, subject, pictures, "score")


def _run(folder: Path, subject: Subject, pictures: Sequence[Image], output: str) -> Tensor:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(folder / _FILE), providers=["CPUExecutionProvider"])
    transform = subject.preprocessing
    found = []
    for some in [pictures[:1], pictures[1:4], *batches(pictures[4:])]:
        if some:
            images = torch.stack([transform(picture) for picture in some]).numpy()
            (part,) = session.run([output], {"images": images})
            found.append(torch.from_numpy(part))
    return torch.cat(found)


def usage(out: Path, subject: Subject) -> str:
    """Return how the export is loaded, in one line."""
    outputs = '"logits", "score"' if subject.has_threshold() else '"logits"'
    return f'onnxruntime.InferenceSession("{out / _FILE}").run([{outputs}], {{"images": images}})'
