"""A built model with its queue and threads."""

from index_builder.models.manifest import ModelManifest
from services.embedder.cpus import usable_cpus
from services.embedder.embedder import Embedder
from services.embedder.images import ImageEmbedder
from services.embedder.onnx_model import OnnxModel

#: Threads of a text that has the CPUs to itself: the short products of one text gain little by more.
MOST_THREADS_ALONE = 4


def load(
    manifest: ModelManifest, *, workers: int, queue_texts: int, queue_images: int, device: str
) -> Embedder | ImageEmbedder:
    """An embedder of what the model reads; takes a moment.

    workers: 0 means as many as the CPUs that this process really has can keep busy.
    EmbedderUnavailable where its runtime, decoder or device is missing.
    """
    workers = workers or max(1, usable_cpus() // manifest.threads)
    if manifest.image is not None:
        return ImageEmbedder.load(manifest, workers=workers, queue_images=queue_images, device=device)
    model = OnnxModel.load(
        manifest,
        threads=manifest.threads,
        threads_alone=min(workers * manifest.threads, MOST_THREADS_ALONE),
        device=device,
    )
    return Embedder(model, workers=workers, queue_texts=queue_texts)
