"""Full disks, networks that lose answers, buckets that vanish: the right outcome, or an error that says why."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtests.harness.object_servers import BUCKET, CREDENTIALS, azurite, make_bucket, moto
from tests.support.fakes import FlakyBackend
from tests.support.store import bundle, keeps_the_protocol, promoted
from vllm_edits.edit_store import EditStore
from vllm_edits.edit_store.backends import ObjectStore, require_exclusive_create
from vllm_edits.edit_store.errors import EditsError, StoreUnavailable
from vllm_edits.edit_store.upkeep.audit import audit

# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> EditStore:
    store = EditStore(str(tmp_path / "store"), create=True)
    promoted(store, "1")
    return store


@pytest.mark.long
@pytest.mark.parametrize("call", ["fsync", "link", "replace", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("after", range(4))
def test_a_disk_that_fails_at_any_write_leaves_a_whole_store(
    folder: EditStore, monkeypatch: pytest.MonkeyPatch, call: str, number: int, after: int
) -> None:
    """The same command completes when the disk is well again."""
    real, left = getattr(os, call), [after]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            raise OSError(number, os.strerror(number))
        left[0] -= 1
        return real(*args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(os, call, failing)
        try:
            folder.promote(f"polite@{folder.publish(bundle('2'))}")
        except StoreUnavailable as error:
            assert os.strerror(number) in str(error)  # noqa: PT017  not every disk is used so often that it fails
    assert audit(folder).findings == []
    version = folder.publish(bundle("2"))
    folder.promote(f"polite@{version}")
    assert folder.resolve("polite") == version
    assert list(Path(folder.url, ".staging").iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_hard_links_is_read_and_not_written(
    folder: EditStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As exFAT (which says EPERM), FAT and some network mounts are. Nothing is left of what was refused."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = sorted(path for path in Path(folder.url).rglob("*") if path.is_file())
    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(StoreUnavailable, match="does not support hard links"):
        EditStore(str(tmp_path / "new"), create=True)
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    opened = EditStore(folder.url)
    for write in (lambda: opened.publish(bundle("2")), lambda: opened.rollback("polite"), lambda: opened.pin("polite")):
        with pytest.raises(EditsError):
            write()
    assert sorted(path for path in Path(folder.url).rglob("*") if path.is_file()) == before
    assert opened.bundle(opened.resolve("polite")).manifest.name == "polite"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full_is_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if mount is None or unmount is None:
        pytest.skip("this machine has no mount")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        store = EditStore(str(disk / "store"), create=True)
        (version,) = promoted(store, "1")
        (disk / "ballast").write_bytes(b"\0" * 200_000)
        with pytest.raises(StoreUnavailable, match="No space left on device"):
            fill(store)
        assert store.resolve("polite") == version
        assert audit(store).findings == []
        (disk / "ballast").unlink()
        promoted(store, "again")
    finally:
        subprocess.run([unmount, str(disk)], check=True)


def fill(store: EditStore) -> None:
    for number in range(100):
        store.publish(bundle(f"{number}"))


# -- backends that do not keep their word ------------------------------------------------------------------------------


class Overwriting(FlakyBackend):
    """Ignores that a write asked to be the only one, as some S3-compatible servers do."""

    def create(self, key: str, data: bytes) -> None:
        self.inner.put(key, data)


def test_a_backend_that_lets_two_writers_win_is_refused(folder: EditStore, monkeypatch: pytest.MonkeyPatch) -> None:
    require_exclusive_create(folder.backend)
    with pytest.raises(StoreUnavailable, match=r"cannot be written safely.*a second write replaced the first"):
        require_exclusive_create(Overwriting(folder.backend))
    monkeypatch.setattr("vllm_edits.edit_store.storage.store._exclusive", set())
    folder.backend = Overwriting(folder.backend)
    for write in (lambda: folder.publish(bundle("2")), lambda: folder.rollback("polite")):
        with pytest.raises(EditsError):
            write()
    assert len(folder.history("polite")) == 1
    assert not list(folder.backend.list("probes/"))


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with moto(tmp_path_factory.mktemp("moto")) as environment:
        yield environment


@pytest.fixture
def reached(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The mock S3, reachable by the environment."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.mark.usefixtures("reached")
def test_a_bucket_keeps_the_protocol() -> None:
    keeps_the_protocol(ObjectStore(f"s3://{BUCKET}/protocol"))


@pytest.mark.skipif(shutil.which("azurite-blob") is None, reason="azurite-blob is not on the PATH: npm install azurite")
def test_azure_keeps_the_protocol_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with azurite(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        keeps_the_protocol(ObjectStore(f"az://{BUCKET}/protocol"))
        store = EditStore(f"az://{BUCKET}/whole", create=True)
        first, _ = promoted(store, "1", "2")
        assert store.rollback("polite").version == first
        assert audit(store).findings == audit(store).garbage == []


@pytest.mark.usefixtures("reached")
def test_a_store_in_a_bucket_does_all_that_a_folder_does() -> None:
    store = EditStore(f"s3://{BUCKET}/whole", create=True)
    first, second = promoted(store, "1", "2")
    assert store.rollback("polite").version == first
    assert EditStore(f"s3://{BUCKET}/whole").resolve("polite@" + second[:8]) == second
    assert len(store.history("polite")) == 3
    assert audit(store).findings == audit(store).garbage == []


def test_a_bucket_that_vanished_is_named_and_not_taken_for_empty(reached: dict[str, str]) -> None:
    store = EditStore(f"s3://{BUCKET}/vanishing", create=True)
    promoted(store, "1")
    make_bucket(reached, remove=True)
    try:
        for use in (store.heads, lambda: EditStore(store.url), lambda: store.publish(bundle("2"))):
            with pytest.raises(EditsError, match=f"s3://{BUCKET}/vanishing"):
                use()
    finally:
        make_bucket(reached)


@pytest.mark.usefixtures("reached")
def test_no_network_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setattr("vllm_edits.edit_store.backends.objects.RETRIES", 0)
    with pytest.raises(StoreUnavailable, match=r"store s3://edits/x: store\.json: ") as told:
        EditStore("s3://edits/x")
    assert "\n" not in str(told.value)


def test_a_server_that_does_not_answer_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vllm_edits.edit_store.backends.objects.REQUEST_SECONDS", 0.5)
    monkeypatch.setattr("vllm_edits.edit_store.backends.objects.RETRIES", 0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StoreUnavailable):
            EditStore("s3://edits/x")


@pytest.mark.usefixtures("reached")
def test_a_process_forked_after_the_first_use_is_refused_not_hung() -> None:
    store = EditStore(f"s3://{BUCKET}/fork", create=True)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing but the answer: this is a copy of the test runner
        try:
            store.heads()
            os.write(write, b"it worked")
        except StoreUnavailable as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert b"before this process was forked" in os.read(read, 10_000)
    os.close(read)
    assert store.heads() == {}, "the parent goes on"


@contextmanager
def losing_answers(endpoint: str, lose: Callable[[bytes], bool]) -> Iterator[str]:
    """A proxy that hands requests on and, where `lose` says so of the request's head, closes without the answer."""
    host, port = endpoint.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection((host, int(port))) as server:
            head = client.recv(65536)
            drop = lose(head)
            server.sendall(head)
            answers = threading.Thread(target=_pump, args=(server, client, drop), daemon=True)
            answers.start()
            try:
                while data := client.recv(65536):
                    server.sendall(data)
            except OSError:
                pass
            answers.join(5)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def _pump(server: socket.socket, client: socket.socket, drop: bool) -> None:
    """Hand answers back; or wait for one, so that the request was done, and hang up."""
    try:
        while data := server.recv(65536):
            if drop:
                client.shutdown(socket.SHUT_RDWR)
                return
            client.sendall(data)
    except OSError:
        return


@pytest.mark.parametrize("losses", [1, 2])
def test_a_promotion_whose_answer_was_lost_is_made_once(
    reached: dict[str, str], monkeypatch: pytest.MonkeyPatch, losses: int
) -> None:
    """The write happened and nobody said so: the entry is looked up, recognised, and not written twice."""
    url = f"s3://{BUCKET}/lossy-{losses}"
    store = EditStore(url, create=True)
    first, second = promoted(store, "1", "2")
    lost: list[bytes] = []

    def lose(head: bytes) -> bool:
        if head.startswith(b"PUT") and b"/tags/polite/" in head.split(b"\r\n", 1)[0] and len(lost) < losses:
            lost.append(head)
            return True
        return False

    with losing_answers(reached["AWS_ENDPOINT_URL"], lose) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        entry = EditStore(url).promote(f"polite@{first}", reason="through the proxy")
    assert len(lost) == losses, "positive control: answers were really lost"
    history = store.history("polite")
    assert [each.version for each in history] == [first, second, first]
    assert history[-1] == entry
