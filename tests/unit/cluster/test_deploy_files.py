"""What deploy/ asks of the service is there: settings, options, paths."""

import re
from pathlib import Path

import pytest
import yaml

from services.__main__ import _parser
from services.config import load

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CHART = (DEPLOY / "helm" / "ringfort" / "templates" / "raycluster.yaml").read_text()
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()


@pytest.mark.parametrize(
    "names",
    [list(COMPOSE["services"]["ringfort"]["environment"]), re.findall(r"name: (RINGFORT_\w+)", CHART)],
    ids=["compose", "chart"],
)
def test_every_setting_exists(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"API_KEYS": '{"key": "default"}', "HOST": "auto", "URL": "postgresql://here/db"}
    assert names
    for name in names:
        value = next((value for suffix, value in values.items() if name.endswith(suffix)), "2")
        monkeypatch.setenv(name, value)
    config = load(None)
    assert config.gateway.api_keys == {"key": "default"}
    assert config.metadata.postgres_url == "postgresql://here/db"


def test_every_option_exists() -> None:
    command = COMPOSE["services"]["ringfort"]["command"]
    assert _parser().parse_args(command).insecure
    options = re.findall(r"^ +- (--\S+?)(?:=(\S+|{{.*}}))?$", CHART, re.MULTILINE)
    given = [f"{name}={'2' if '{{' in value else value}" if value else name for name, value in options]
    asked = _parser().parse_args(["up", *given])
    assert (asked.cluster, asked.nodes, asked.insecure) == (True, 2, True)
    assert asked.ray_address == "127.0.0.1:6379"


def test_what_the_image_is_made_of_exists() -> None:
    copied = [
        part for line in re.findall(r"^COPY (.*) \S+$", CONTAINERFILE, re.MULTILINE) for part in line.split()
    ]
    assert len(copied) >= 10
    for path in copied:
        assert (ROOT / path).exists(), path
    assert set(re.findall(r"-c (\S+)", CONTAINERFILE)) <= set(copied)


def test_every_value_of_the_chart_is_used_and_given() -> None:
    values = yaml.safe_load((DEPLOY / "helm" / "ringfort" / "values.yaml").read_text())
    templates = "".join(path.read_text() for path in (DEPLOY / "helm" / "ringfort" / "templates").iterdir())
    used = {tuple(name.split(".")) for name in re.findall(r"\.Values\.([\w.]+)", templates)}
    for path in used:
        value = values
        for part in path:
            assert part in value, path
            value = value[part]
    assert {path[0] for path in used} == set(values)
