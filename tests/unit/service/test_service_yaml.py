"""docs/examples/service.yaml: what it says is known to Cloud Run, within what that allows, and known to Tricorn.

The structs are those of Cloud Run's reference of `serving.knative.dev/v1`, as far as the file goes into it: a field
that is misspelt, or in the wrong place, is none of theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
import yaml
from msgspec import Meta, Struct, field

from tricorn.chat.readiness import LOG_PATIENCE
from tricorn.service.auth import check_exposure
from tricorn.service.pages import PAGES, READY
from tricorn.service.settings import ServiceSettings

SERVICE = Path(__file__).parents[3] / "docs/examples/service.yaml"
KILLED_AFTER = 10  # seconds from SIGTERM to SIGKILL

Name = Annotated[str, Meta(pattern=r"\A[a-z]([a-z0-9-]{0,47}[a-z0-9])?\Z")]
Number = Annotated[str, Meta(pattern=r"\A[0-9]+\Z")]  # annotations are text
Switch = Literal["true", "false"]
Port = Annotated[int, Meta(ge=1, le=65535)]


class Known(Struct, forbid_unknown_fields=True, rename="camel", kw_only=True):
    pass


class HttpGet(Known):
    path: Annotated[str, Meta(pattern=r"\A/")]
    port: Port


class Probe(Known):
    http_get: HttpGet
    period_seconds: Annotated[int, Meta(ge=1, le=240)]
    timeout_seconds: Annotated[int, Meta(ge=1, le=240)]
    failure_threshold: Annotated[int, Meta(ge=1)]


class SecretKeyRef(Known):
    name: str
    key: str


class ValueFrom(Known):
    secret_key_ref: SecretKeyRef


class Variable(Known):
    name: str
    value: str | None = None
    value_from: ValueFrom | None = None


class ContainerPort(Known):
    name: Literal["http1", "h2c"]
    container_port: Port


class Limits(Known):
    cpu: Literal["1", "2", "4", "8"]
    memory: Annotated[str, Meta(pattern=r"\A[0-9]+(Mi|Gi)\Z")]


class Resources(Known):
    limits: Limits


class Container(Known):
    image: str
    ports: Annotated[list[ContainerPort], Meta(min_length=1, max_length=1)]
    resources: Resources
    env: list[Variable]
    startup_probe: Probe
    liveness_probe: Probe


class RevisionSpec(Known):
    container_concurrency: Annotated[int, Meta(ge=1, le=1000)]
    timeout_seconds: Annotated[int, Meta(ge=1, le=3600)]
    containers: Annotated[list[Container], Meta(min_length=1)]


class Annotations(Known):
    min_scale: Number = field(name="autoscaling.knative.dev/minScale")
    max_scale: Number = field(name="autoscaling.knative.dev/maxScale")
    cpu_throttling: Switch = field(name="run.googleapis.com/cpu-throttling")
    startup_cpu_boost: Switch = field(name="run.googleapis.com/startup-cpu-boost")
    session_affinity: Switch = field(name="run.googleapis.com/sessionAffinity")


class RevisionMetadata(Known):
    annotations: Annotations


class Template(Known):
    metadata: RevisionMetadata
    spec: RevisionSpec


class Traffic(Known):
    latest_revision: bool
    percent: Annotated[int, Meta(ge=0, le=100)]


class ServiceSpec(Known):
    template: Template
    traffic: list[Traffic]


class ServiceMetadata(Known):
    name: Name


class Service(Known):
    api_version: Literal["serving.knative.dev/v1"]
    kind: Literal["Service"]
    metadata: ServiceMetadata
    spec: ServiceSpec


@pytest.fixture
def service() -> Service:
    return msgspec.convert(yaml.safe_load(SERVICE.read_text()), Service)


def test_what_cloud_run_does_not_know_would_show() -> None:
    misspelt = SERVICE.read_text().replace("timeoutSeconds: 3600", "timeout: 3600")
    with pytest.raises(msgspec.ValidationError, match="unknown field `timeout`"):
        msgspec.convert(yaml.safe_load(misspelt), Service)


def test_tricorn_starts_with_what_it_sets(service: Service) -> None:
    revision = service.spec.template.spec
    [container] = revision.containers
    environ = {
        "PORT": str(container.ports[0].container_port),
        "K_SERVICE": service.metadata.name,
        **{each.name: each.value or "what a secret has in it, at least 32 bytes" for each in container.env},
    }
    settings = ServiceSettings.from_environ(environ)
    check_exposure(settings)
    assert (settings.host, settings.port) == ("0.0.0.0", 8080)
    assert settings.max_connections >= revision.container_concurrency
    assert settings.drain_timeout < KILLED_AFTER


def test_its_probes_ask_what_there_is_and_wait_for_the_answer(service: Service) -> None:
    [container] = service.spec.template.spec.containers
    [port] = container.ports
    for probe, path in ((container.startup_probe, READY), (container.liveness_probe, "/healthz")):
        assert probe.http_get.path == path
        assert probe.http_get.port == port.container_port
        assert LOG_PATIENCE < probe.timeout_seconds <= probe.period_seconds
    assert "/healthz" in PAGES
    assert port.name == "http1", "probes and WebSockets want HTTP/1.1"
