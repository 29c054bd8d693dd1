"""A release of an image model: an ONNX graph as it was published, and how pictures are prepared for it."""

import hashlib
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import helper

from index_builder.models.build import RECIPE
from index_builder.models.engine import ENGINE, Engine, EngineUnavailable
from index_builder.models.manifest import GRAPH_FILE, Agreement, ImageInput, ModelManifest
from index_builder.models.publication import BUILDING, publish, sole_builder
from index_builder.models.reduction import VECTORS
from index_builder.models.release import MODEL, ReleaseRefused
from index_builder.models.source import ModelMissing, ModelUnsupported
from index_builder.models.space import image_space_id, variant_id

#: Its weights are run as they were published, so it agrees with itself.
PUBLISHED = Agreement(mean=1.0, p1=1.0, worst=1.0)
#: Pixels sum up in an order of the runtime's own.
BATCH_SLACK = 1e-4


def release_images(graph_file: Path, out: Path, model: str, output: str, image: ImageInput) -> ModelManifest:
    """Make `output` of a published graph, flattened and normalised, the vectors of pictures.

    In `out`/NAME@VERSION/fp32. ReleaseRefused where the version is there; ModelMissing; ModelUnsupported
    where the graph has no such input or output, or gives a picture another vector beside others.
    """
    if not MODEL.fullmatch(model):
        raise ReleaseRefused(f"{model!r} is not NAME@VERSION of letters, digits, '.', '_' and '-'")
    if not graph_file.is_file():
        raise ModelMissing(f"{graph_file} is not there")
    published = graph_file.read_bytes()
    graph = _with_vectors(published, graph_file, output, image)
    dim = _tried(graph, graph_file, image)
    space = image_space_id(
        graph_sha256=hashlib.sha256(published).hexdigest(),
        output=output,
        preparation=msgspec.to_builtins(image),
    )
    checksum = hashlib.sha256(graph).hexdigest()
    target = out / model / "fp32"
    target.parent.mkdir(parents=True, exist_ok=True)
    with sole_builder(target.parent):
        if target.exists():
            raise ReleaseRefused(f"{target.parent}: is released already (fp32); name a new version")
        building = Path(tempfile.mkdtemp(prefix=BUILDING, dir=target.parent))
        (building / GRAPH_FILE).write_bytes(graph)
        ModelManifest(
            name=model.partition("@")[0],
            version=model.partition("@")[2],
            precision="fp32",
            space=space,
            variant=variant_id(space=space, precision="fp32", engine=ENGINE, artifact_sha256=checksum),
            dim=dim,
            max_tokens=0,
            prompts={},
            files={GRAPH_FILE: checksum},
            agreement=PUBLISHED,
            recipe=RECIPE,
            directory=building,
            image=image,
        ).save()
        publish(building, target)
    return ModelManifest.load(target)


def _with_vectors(published: bytes, path: Path, output: str, image: ImageInput) -> bytes:
    """The graph with `output`, flattened to a row a picture and of length 1, as its one output."""
    try:
        model = onnx.load_from_string(published)
    except Exception as error:  # protobuf's own
        raise ModelUnsupported(f"{path}: not an ONNX graph ({error})") from None
    if image.input not in {each.name for each in model.graph.input}:
        raise ModelUnsupported(f"{path}: has no input {image.input!r}")
    if output not in {name for node in model.graph.node for name in node.output}:
        raise ModelUnsupported(f"{path}: computes no {output!r}")
    flat = f"{VECTORS}.flat"
    model.graph.node.extend(
        [
            helper.make_node("Flatten", [output], [flat], axis=1),
            helper.make_node("LpNormalization", [flat], [VECTORS], axis=-1, p=2),
        ]
    )
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(VECTORS, onnx.TensorProto.FLOAT, None))
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _tried(graph: bytes, path: Path, image: ImageInput) -> int:
    """The dimension of the vectors of a graph that runs, and gives a picture one vector in any company."""
    size = (image.height, image.width)
    shape = (3, 3, *size) if image.layout == "CHW" else (3, *size, 3)
    pictures = np.random.default_rng(0).random(shape, np.float32)
    try:
        engine = Engine.load(graph, threads=1)
        together = engine.run({image.input: pictures})
        alone = np.concatenate([engine.run({image.input: picture[None]}) for picture in pictures])
    except EngineUnavailable as error:
        raise ModelUnsupported(f"{path}: {error}") from None
    except Exception as error:  # the runtime raises plain Exceptions of its own making
        raise ModelUnsupported(
            f"{path}: cannot be run on {image.width} by {image.height} ({error})"
        ) from None
    if together.ndim != 2 or len(together) != 3 or not np.abs(together - alone).max() < BATCH_SLACK:
        raise ModelUnsupported(f"{path}: gives a picture another vector beside others")
    return int(together.shape[1])
