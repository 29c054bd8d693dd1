"""`python -m index_builder.models build SOURCE`: from a published model to one that the service can run.

Exit codes: 0 built, 1 refused, 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from index_builder.models.gate_table import gate_table
from index_builder.models.manifest import ImageInput, ModelManifest, Requirements

FAILED, INTERRUPTED = 1, 130
#: Columns where the output is no terminal: enough for the table to be read in a file or a log.
PIPED_WIDTH = 180


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. A refusal is one sentence on stderr, or JSON with --json."""
    arguments = _parser().parse_args(argv)

    # Here, for they take a second.
    from index_builder.models.build import ModelInaccurate
    from index_builder.models.reduction import ReductionImpossible
    from index_builder.models.release import ReleaseRefused
    from index_builder.models.source import ModelMissing, ModelUnsupported

    try:
        manifest = _build(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (
        ModelMissing, ModelUnsupported, ModelInaccurate, ReductionImpossible, ReleaseRefused, OSError
    ) as error:  # fmt: skip
        return _failed(error, as_json=arguments.json)
    if arguments.json:
        print(json.dumps(_facts(manifest), ensure_ascii=False))
    else:
        if manifest.gate:
            Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(gate_table(manifest))
        print(f"{manifest.model} {manifest.precision} is in {manifest.directory}")
    return 0


def _build(arguments: argparse.Namespace) -> ModelManifest:
    from index_builder.models import gate
    from index_builder.models.image_release import release_images
    from index_builder.models.release import PRECISIONS, Wanted, release

    if arguments.image:
        name = arguments.name or f"{arguments.source.stem.lower()}@1"
        return release_images(arguments.source, arguments.out, name, arguments.output or "", arguments.image)
    name = arguments.name or f"{arguments.source.resolve().name.lower()}@1"
    wanted = Wanted(
        model=name,
        precisions=tuple(dict.fromkeys(arguments.precision or PRECISIONS)),
        threads=tuple(dict.fromkeys(arguments.threads or sorted({1, len(os.sched_getaffinity(0))}))),
        reduction=arguments.reduction,
        dimensions=tuple(dict.fromkeys(arguments.dimensions)),
        requirements=Requirements(
            p1=arguments.min_p1,
            batch_invariance=arguments.min_batch_invariance,
            overlap=arguments.min_overlap,
            kept=arguments.min_kept,
        ),
        prefer=arguments.prefer,
        texts=_lines(arguments.texts) if arguments.texts else gate.TEXTS,
        fit_texts=_lines(arguments.fit_texts) if arguments.fit_texts else (),
    )
    silent = arguments.json or not sys.stderr.isatty()
    with Console(stderr=True).status("") as status:

        def progress(stage: str, share: float) -> None:
            if not silent:
                status.update(f"{name}: {stage} ({share:.0%})")

        return release(arguments.source, arguments.out, wanted, progress)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ringfort models", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build a model from what was published")
    build.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a sentence-transformers directory, or an ONNX file",
    )
    build.add_argument(
        "--image", type=_image, metavar="JSON",
        help='how pictures are prepared: {"input": "pixels", "width": 224, "height": 224, "mean": […], …}',
    )  # fmt: skip
    build.add_argument("--output", metavar="NAME", help="with --image: what becomes the vector")
    build.add_argument("--name", metavar="NAME@VERSION", help="default: the directory's name @1")
    build.add_argument("--out", type=Path, metavar="DIR", default=Path("models"), help="default: ./models")
    build.add_argument(
        "--precision", action="append", metavar="P", help="fp32, int8, weight8 or fp16; repeatable; all"
    )
    build.add_argument("--threads", action="append", type=_positive, metavar="N", help="repeatable; 1, all")
    build.add_argument("--reduction", default="", metavar="KIND", help="int8, or pca:DIM with --fit-texts")
    build.add_argument(
        "--fit-texts", type=Path, metavar="FILE", help="texts that fit a PCA, one a line, like those to come"
    )
    build.add_argument(
        "--dimension", action="append", type=_positive, default=[], dest="dimensions", metavar="N",
        help="a length at which the model was trained to let its vectors' heads stand alone; repeatable",
    )  # fmt: skip
    build.add_argument("--texts", type=Path, metavar="FILE", help="texts that judge, one a line, held aside")
    build.add_argument("--prefer", choices=("throughput", "latency"), default="throughput")
    defaults = Requirements()
    for name in ("p1", "batch_invariance", "overlap", "kept"):
        build.add_argument(
            f"--min-{name.replace('_', '-')}", type=float, default=getattr(defaults, name), metavar="X",
            help="default: %(default)s",
        )  # fmt: skip
    build.add_argument("--json", action="store_true", help="print the manifest in one line")
    return parser


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise ValueError
    return number


def _image(word: str) -> ImageInput:
    try:
        return msgspec.json.decode(word, type=ImageInput)
    except msgspec.MsgspecError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _facts(manifest: ModelManifest) -> dict[str, object]:
    facts: dict[str, object] = msgspec.json.decode(manifest.encode())
    return {**facts, "directory": str(manifest.directory)}


def _failed(error: Exception, *, as_json: bool) -> int:
    message = " ".join(str(error).split())
    if as_json:
        told = {
            "code": "FAILED_PRECONDITION",
            "message": message,
            "field": "",
            "reason": type(error).__name__,
        }
        print(json.dumps({"error": told}, ensure_ascii=False), file=sys.stderr)
    else:
        print(f"ringfort: {message}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
