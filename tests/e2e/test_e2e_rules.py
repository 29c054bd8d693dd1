"""Alerts and dashboard speak of metrics that the running service exports, and alert as their tests say."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import grpc
import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from scrape import Scrape

from deploy.observability import dashboard, rules
from deploy.observability.objectives import FAULTS
from ringfort import Client
from services.gateway.server import SERVICES
from services.telemetry import LATENCY_BUCKETS_S, STAGES

HERE = Path(rules.__file__).parent
PROMTOOL = os.environ.get("PROMTOOL") or shutil.which("promtool")
NAME = re.compile(r"\b(?:ringfort|process)[_:][a-zA-Z0-9_:]+")


def expressions() -> list[str]:
    told = [rule["expr"] for group in rules.rules()["groups"] for rule in group["rules"]]
    for panel in dashboard.dashboard()["panels"]:
        told += [target["expr"] for target in panel.get("targets", ())]
    return told


def labels(name: str) -> set[str]:
    """Every value that an expression compares a label with."""
    found = (re.findall(rf'\b{name}=~?"([^"]*)"', each) for each in expressions())
    return {value for values in found for told in values for value in told.split("|")}


@pytest.fixture(scope="module")
def exported(scrape: Scrape, client: Client) -> set[str]:
    client.create_collection("watched")
    client.search("watched", text="anything")
    client.delete_collection("watched")
    client.create_collection("watched")
    texts = [httpx.get(f"http://{each}/metrics", timeout=30).text for each in scrape.gateways]
    client.delete_collection("watched")
    families = [family for text in texts for family in text_string_to_metric_families(text)]
    return {sample.name for family in families for sample in family.samples}


def test_every_metric_named_is_exported_or_recorded(exported: set[str]) -> None:
    recorded = {
        rule["record"] for group in rules.rules()["groups"] for rule in group["rules"] if "record" in rule
    }
    named = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(named) > 30
    assert named - recorded - exported == set()


def test_every_label_value_named_can_occur() -> None:
    methods = {method.name for descriptor in SERVICES.values() for method in descriptor.methods}
    assert labels("stage") <= STAGES.keys()
    assert labels("method") <= methods
    assert labels("code") == set(FAULTS.split("|")) <= {code.name for code in grpc.StatusCode}
    assert labels("le") <= set(map(str, LATENCY_BUCKETS_S))


def test_the_files_are_what_they_are_made_from() -> None:
    assert rules.FILE.read_text() == rules.written(), "python -m deploy.observability.rules"
    assert dashboard.FILE.read_text() == dashboard.written(), "python -m deploy.observability.dashboard"
    assert yaml.safe_load(rules.FILE.read_text()) == rules.rules()
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_objective_burns_at_four_speeds_over_two_windows_each() -> None:
    burning = rules.rules()["groups"][1]["rules"]
    assert len(burning) == 4 * len(rules.OBJECTIVES)
    for rule in burning:
        [long, short] = re.findall(r"bad_share_(\w+) > (\S+)", rule["expr"])
        assert long[0] == rule["labels"]["window"] != short[0]
        assert long[1] == short[1]
    paging = [rule["expr"] for rule in burning if rule["labels"]["severity"] == "page"]
    # 14.4 times a budget of a thousandth.
    assert "bad_share_1h > 0.0144 " in paging[0]


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt install prometheus)")
@pytest.mark.parametrize("command", [("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")])
def test_promtool_agrees(command: tuple[str, ...]) -> None:
    assert PROMTOOL is not None
    told = subprocess.run([PROMTOOL, *command], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stdout + told.stderr
