"""MLflow: a server that answers and lets this user in, asked as MLflow's client asks, or a SQLite file."""

import base64
import configparser
import json
import os
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.doctor.checks import Check, failure, ok, warning
from pipeline.doctor.database import check_sqlite, deleted_experiment
from pipeline.errors import ConfigError
from pipeline.redaction import redact, without_secrets
from pipeline.tracking import resolve_uri, shipper_environment

_TIMEOUT_S = 5.0
_MOST_READ_BYTES, _PART_BYTES = 1 << 20, 1 << 16
_MOST_HOPS = 5
_CREDENTIALS = "~/.mlflow/credentials"
_EXPERIMENT = "/api/2.0/mlflow/experiments/get-by-name?experiment_name="


def check_tracking(config: Config | None) -> Iterator[Check]:
    """Where runs are tracked, and whether that works from here."""
    uri = resolve_uri(config) if config else os.environ.get("MLFLOW_TRACKING_URI")
    experiment = config.tracking.experiment if config else "Default"
    if not uri:
        why = f"the journal alone (tracking.uri={config.tracking.uri})" if config else "no MLFLOW_TRACKING_URI"
        later = "; `electra sync` fills a SQLite file from it" if config and config.tracking.uri == "auto" else ""
        yield ok("mlflow server", why + later)
    elif uri.startswith(("http://", "https://")):
        yield from check_server(uri, experiment)
    elif uri.startswith("sqlite:///"):
        yield check_sqlite(Path(uri.removeprefix("sqlite:///")), experiment)
    else:
        yield ok("mlflow server", f"{redact(uri)}: not asked, its client is MLflow's own")


def check_server(uri: str, experiment: str) -> Iterator[Check]:
    """Asks for its health, its version, and as this user for the experiment; no answer is waited for longer than 5 s.

    Args:
        uri: Of the server; may hold user and password, which are never shown and go before those of the environment.
        experiment: Name.
    """
    shown, environment = redact(uri), shipper_environment(uri)  # with whose credentials the run will ask
    if signer := _signer(environment):
        yield ok("mlflow server", f"{shown}: not asked, {signer} has requests signed by a part of MLflow's client")
        return
    base, get = environment["ELECTRA_TRACKING_URI"].rstrip("/"), _client(environment)
    try:
        status, _, _ = _get(get, f"{base}/health")
        version = _get(get, f"{base}/version")[1].strip() if status == 200 else ""
        access, answer, is_known = _get(get, base + _EXPERIMENT + urllib.parse.quote(experiment))
    except OSError as error:  # of requests, timeouts and TLS among them
        yield failure("mlflow server", f"{shown}: {without_secrets(_first_cause(error), uri)}",
                      _of_silence(base, environment))  # fmt: skip
        return
    if access in (401, 403):
        given = "the credentials given" if is_known else "a request without credentials"
        remedy = (
            "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or write "
            f"{_CREDENTIALS}"
        )
        yield failure("mlflow server", f"{shown} refuses {given} ({access})", remedy)
        return
    if 300 <= access < 400:
        remedy = "set tracking.uri to the address of MLflow itself; a login page before it needs a way in for programs"
        yield failure("mlflow server", f"{shown} leads on to {redact(answer)}, where nothing was sent", remedy)
        return
    found = _read_experiment(answer) if access == 200 else None
    if found is None and not (access == 404 and "RESOURCE_DOES_NOT_EXIST" in answer):
        remedy = "see whether this is the address of an MLflow server, and its log"
        what = "with something else" if access == 200 else access
        yield failure("mlflow server", f"{shown} answers {what} where MLflow's API should be", remedy)
        return
    if "<" not in version and version:
        yield from _compare_versions(version, metadata.version("mlflow"))
    if found and found.get("lifecycle_stage") == "deleted":
        yield deleted_experiment("mlflow server", shown, experiment, found.get("experiment_id", "ID"))
    else:
        state = "will be made" if found is None else "is there"
        yield ok("mlflow server", f"{shown}; experiment {experiment!r} {state}")


def _signer(environment: Mapping[str, str]) -> str:
    """The setting by which requests are signed as only MLflow's client can; empty: they are not."""
    if _is_on(environment, "MLFLOW_TRACKING_AWS_SIGV4"):
        return "MLFLOW_TRACKING_AWS_SIGV4"
    plugin = environment.get("MLFLOW_TRACKING_AUTH")
    return f"MLFLOW_TRACKING_AUTH={plugin}" if plugin else ""


def _is_on(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() in ("true", "1")


def _client(environment: Mapping[str, str]) -> Callable[..., Any]:
    """GET by the library of MLflow's client, and with what that gives it.

    The library itself knows proxies, .netrc and where certificates are (REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, certifi).
    What it is given: mlflow/utils/rest_utils.py.

    Raises:
        ConfigError: MLflow would refuse the settings.
    """
    import requests  # comes with MLflow

    bundle, is_insecure = environment.get("MLFLOW_TRACKING_SERVER_CERT_PATH"), "MLFLOW_TRACKING_INSECURE_TLS"
    if bundle and _is_on(environment, is_insecure):
        raise ConfigError(f"{is_insecure} and MLFLOW_TRACKING_SERVER_CERT_PATH exclude each other; unset one of them")
    return partial(
        requests.get,
        headers=_authorization(environment),
        verify=bundle or not _is_on(environment, is_insecure),
        cert=environment.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None,
        timeout=_TIMEOUT_S,
        allow_redirects=False,  # it would ask wherever an answer leads
        stream=True,
    )


def _get(get: Callable[..., Any], url: str) -> tuple[int, str, bool]:
    """Status; text, or of an answer that leads to another server, where to; and whether credentials were sent.

    Raises:
        OSError: No answer.
    """
    for _ in range(_MOST_HOPS):
        with get(url) as response:
            is_known = "Authorization" in response.request.headers
            if not response.is_redirect:
                text = b""
                for part in response.iter_content(_PART_BYTES):
                    text += part
                    if len(text) >= _MOST_READ_BYTES:
                        break
                return response.status_code, text.decode(errors="replace"), is_known
            before, url = url, urllib.parse.urljoin(url, response.headers["Location"])
        if urllib.parse.urlsplit(before)[:2] != urllib.parse.urlsplit(url)[:2]:
            return response.status_code, url, is_known
    raise OSError(f"leads on and on, lastly to {redact(url)}")


def _first_cause(error: BaseException) -> str:
    """What the system said; the library repeats it in the midst of its own objects."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(error)


def _read_experiment(answer: str) -> dict[str, Any] | None:
    try:
        found = json.loads(answer)
    except ValueError:  # a page for people
        return None
    experiment = found.get("experiment") if isinstance(found, dict) else None
    return experiment if isinstance(experiment, dict) else None


def _authorization(environment: Mapping[str, str]) -> dict[str, str]:
    """As MLflow's client does it: user and password, each from the environment or else its file, else a token."""
    of_file = _read_credentials(Path(_CREDENTIALS).expanduser())
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    user, password = (environment.get(name) or of_file.get(name.lower()) for name in names)
    if user and password:
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
    token = environment.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _read_credentials(path: Path) -> dict[str, str]:
    """User and password of the file that MLflow's client reads (mlflow/utils/credentials.py, which takes seconds).

    Raises:
        ConfigError: It cannot be read as MLflow reads it; the parser's own message may hold the password.
    """
    parser = configparser.ConfigParser()
    try:
        parser.read(path)
        return dict(parser["mlflow"]) if "mlflow" in parser else {}
    except (configparser.Error, UnicodeDecodeError) as error:
        problem = f"{path}: MLflow's client cannot read it ({type(error).__name__})"
        raise ConfigError(f"{problem}; mend it: a section [mlflow], and %% for a % in a password") from None


def _of_silence(base: str, environment: Mapping[str, str]) -> str:
    parts = urllib.parse.urlsplit(base)
    proxy = environment.get(f"{parts.scheme}_proxy") or environment.get(f"{parts.scheme.upper()}_PROXY")
    later = "tracking.uri=none and `electra sync` from a login node do without it"
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        return f"the request goes through the proxy {redact(proxy)}: add {parts.hostname} to no_proxy; or {later}"
    return f"see whether this node reaches it (curl {redact(base)}/health); {later}"


def _compare_versions(server: str, client: str) -> Iterator[Check]:
    value = f"{server}, the client {client}"
    if server.split(".")[0] == client.split(".")[0]:
        yield ok("mlflow versions", f"server {value}")
    else:
        yield warning("mlflow versions", f"server {value}", "have both of one major version")
