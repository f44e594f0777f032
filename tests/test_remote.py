"""Stores behind s3://, gs:// and http://: the same episodes and refusals, each naming the address, no secrets told."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import contract_of, policy_config
from test_store import LENGTHS, assert_holds, create, make_episode, make_store, small_spec

from dita.datasets.dataset import WindowDataset
from dita.datasets.files import open_files
from dita.datasets.inspect import inspect, inspect_command
from dita.datasets.mixture import MixtureSampler, loader
from dita.datasets.store import Store, StoreError
from dita.preprocess import Preprocessor

pytest.importorskip("obstore")
boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")

SECRET = "canary-that-must-not-be-told"
SHARD = "segments/main-0000/images/cam1/c/1/0/0/0"
SCHEMES = ("s3", "gs", "http", "ranged")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own file server: whole files only."""

    requests: list[str]  # of the server

    def log_message(self, *args: object) -> None: ...


class Ranged(Quiet):
    """One that sends parts, as object stores do, and remembers what it was asked for."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # pyright: ignore
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(content) - int(last))
        stop = int(last) + 1 if first and last else len(content)
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content[start:stop])))
        self.send_header("Last-Modified", "Thu, 26 Nov 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(content[start:stop])


def serve(folder: Path, handler: type[Quiet]) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    server.requests = []  # pyright: ignore
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of an S3-speaking server; its buckets answer as Google's XML API does, too."""
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def environment(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = {"gcs_base_url": s3, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    (tmp_path / "account.json").write_text(json.dumps(account))
    for name in [n for n in os.environ if n.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    values = {
        "AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3, "GOOGLE_SERVICE_ACCOUNT": str(tmp_path / "account.json"),
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)


class Remote:
    """A local store and the same one as a server gives it."""

    def __init__(self, scheme: str, folder: Path, endpoint: str) -> None:
        self.local = folder / "s.zarr"
        self.scheme = scheme
        if scheme in ("http", "ranged"):
            self.server = serve(folder, Ranged if scheme == "ranged" else Quiet)
            self.url = f"http://127.0.0.1:{self.server.server_port}/s.zarr"
        else:
            self.client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
            self.bucket = "b" + hashlib.sha256(str(folder).encode()).hexdigest()[:30]
            self.client.create_bucket(Bucket=self.bucket, ACL="public-read")
            self.url = f"{scheme}://{self.bucket}/data/s.zarr"

    def push(self) -> str:
        """Make the server's copy equal to the local one; return the address."""
        if self.scheme in ("s3", "gs"):
            there = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
            for entry in there:
                self.client.delete_object(Bucket=self.bucket, Key=entry["Key"])
            for file in (f for f in self.local.rglob("*") if f.is_file()):
                key = f"data/s.zarr/{file.relative_to(self.local)}"
                acl = "public-read" if self.scheme == "gs" else "private"  # Google's tokens mean nothing to this server
                self.client.put_object(Bucket=self.bucket, Key=key, Body=file.read_bytes(), ACL=acl)
        return self.url


@pytest.fixture(params=SCHEMES)
def remote(request: pytest.FixtureRequest, s3: str, environment: None, tmp_path: Path) -> Iterator[Remote]:
    remote = Remote(request.param, tmp_path, s3)
    yield remote
    if hasattr(remote, "server"):
        remote.server.shutdown()
        remote.server.server_close()


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_a_remote_store_equals_the_local_one(remote: Remote, codec: str) -> None:
    spec = small_spec()
    episodes = make_store(remote.local, spec, codec=codec)
    with create(remote.local, spec, exist="resume", writer="b", codec=codec) as writer:
        writer.add(make_episode(spec, 9, 30))
    local, there = Store(remote.local), Store(remote.push())
    assert there.path == remote.url and there.segments == ("b-0000", "main-0000")
    assert there.spec == local.spec and there.codecs == (codec,)
    for i in range(len(local.episodes)):
        for name in ("state", "action", "stamp"):
            assert getattr(there, name)(i).tobytes() == getattr(local, name)(i).tobytes()
        for camera in ("cam0", "cam1"):
            frames = range(local.length(i))
            assert np.array_equal(there.read_frames(i, camera, frames), local.read_frames(i, camera, frames))
    if codec == "raw":
        assert_holds(there, 3, episodes[2])
    assert there.verify() == local.verify()
    here, far = inspect(local), inspect(there)
    assert {k: v for k, v in far.items() if k != "path"} == {k: v for k, v in here.items() if k != "path"}


def test_plain_zarr_python_reads_the_same_from_s3(s3: str, environment: None, tmp_path: Path) -> None:
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    remote = Remote("s3", tmp_path, s3)
    make_store(remote.local, small_spec())
    store = Store(remote.push())
    plain = ObjectStore(from_url(remote.url, client_options={"allow_http": True}), read_only=True)
    segment = zarr.open_group(plain, mode="r")["segments/main-0000"]
    entry = store.episodes[2]
    assert np.array_equal(store.read_frames(2, "cam1", range(200)), segment["images/cam1"][entry.start : entry.stop])
    assert np.array_equal(store.action(2), segment["action"][entry.start : entry.stop])


def test_a_window_is_one_request(tmp_path: Path) -> None:
    remote = Remote("ranged", tmp_path, "")
    make_store(remote.local, small_spec())
    store = Store(remote.url)
    requests = remote.server.requests  # pyright: ignore
    requests.clear()
    store.read_frames(0, "cam0", [3, 7])  # opens the shard
    assert requests == ["/s.zarr/segments/main-0000/images/cam0/c/0/0/0/0"] * 2
    store.read_frames(0, "cam0", list(range(4, 36, 2)))
    assert len(requests) == 3
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert len(requests) == 3  # a worker checks nothing twice
    assert np.array_equal(copy.read_frames(0, "cam0", [3]), store.read_frames(0, "cam0", [3]))
    remote.server.shutdown()
    remote.server.server_close()


def test_missing_objects(remote: Remote) -> None:
    make_store(remote.local, small_spec())
    store = Store(remote.push())
    (remote.local / SHARD).unlink()
    remote.push()
    with pytest.raises(StoreError, match=rf"E_CHUNK_MISSING: {remote.url}/{SHARD}.*\(test/002\), frame 105"):
        Store(remote.url)
    for attempt in (lambda: store.read_frames(2, "cam1", [120]), store.verify):
        with pytest.raises(StoreError, match=rf"E_CHUNK_MISSING: {remote.url}/{SHARD}.*\(test/002\), frame 105"):
            attempt()
    (remote.local / "segments/main-0000.sealed.json").unlink()
    remote.push()
    with pytest.raises(StoreError, match=f"E_UNSEALED: {remote.url} has no episodes"):
        Store(remote.url)
    shutil.rmtree(remote.local)
    remote.push()
    with pytest.raises(FileNotFoundError, match=f"no store at {remote.url}"):
        Store(remote.url)


def test_damaged_objects(remote: Remote) -> None:
    make_store(remote.local, small_spec())
    store = Store(remote.push())
    shard = remote.local / SHARD
    content = bytearray(shard.read_bytes())
    content[10 * (8 * 8 * 3 + 4) + 77] ^= 4
    shard.write_bytes(content)
    remote.push()
    for attempt in (lambda: store.read_frames(2, "cam1", [115]), Store(remote.url).verify):
        with pytest.raises(StoreError, match=rf"E_CHECKSUM: {remote.url}/{SHARD}: .*\(test/002\), frame 115"):
            attempt()
    for size in (len(content) - 1, 1000, 0):
        shard.write_bytes(content[:size])
        remote.push()
        with pytest.raises(StoreError, match=f"E_TRUNCATED: .*expected {len(content)} bytes, found {size}"):
            Store(remote.url)
        with pytest.raises(StoreError, match=f"(E_TRUNCATED|E_CHECKSUM): {remote.url}/{SHARD}"):
            pickle.loads(pickle.dumps(store)).read_frames(2, "cam1", [115])  # noqa: S301
    shard.write_bytes(content)
    metadata = remote.local / "segments/main-0000/state/zarr.json"
    metadata.write_text(metadata.read_text().replace("441", "440"))
    remote.push()
    with pytest.raises(StoreError, match=rf"E_SCHEMA: {remote.url}/segments/main-0000/state/zarr\.json: shape"):
        Store(remote.url)


def test_an_old_zarr_and_what_is_no_store(remote: Remote) -> None:
    zarr.open_group(remote.local, mode="w", zarr_format=2)
    with pytest.raises(StoreError, match="Zarr v2"):
        Store(remote.push())
    shutil.rmtree(remote.local)
    zarr.open_group(remote.local, mode="w", zarr_format=3)
    with pytest.raises(StoreError, match=r"attributes lack dita\.format_version"):
        Store(remote.push())


def test_wrong_bucket(environment: None) -> None:
    for scheme in ("s3", "gs"):
        with pytest.raises(FileNotFoundError, match=f"^no store at {scheme}://no-such-bucket/s.zarr"):
            Store(f"{scheme}://no-such-bucket/s.zarr")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_no_network(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dita.datasets.files.RETRY", {"max_retries": 1})
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    for url in ("s3://bucket/s.zarr", f"http://127.0.0.1:{free_port()}/s.zarr"):
        with pytest.raises(StoreError, match=f"^E_NETWORK: {url}/zarr.json: connection refused; check ") as caught:
            Store(url)
        assert "\n" not in str(caught.value) and SECRET not in str(caught.value)


class Refusing(Quiet):
    """Says no, and quotes what it was sent."""

    def do_GET(self) -> None:
        text = f"<Error><Code>SignatureDoesNotMatch</Code>{self.headers} {SECRET}</Error>".encode()
        self.send_response(self.server.status)  # pyright: ignore
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.mark.parametrize(("status", "code"), [(401, "E_DENIED"), (403, "E_DENIED"), (500, "E_NETWORK")])
def test_what_a_server_answers_is_not_repeated(environment, tmp_path, monkeypatch, caplog, status, code) -> None:
    monkeypatch.setattr("dita.datasets.files.RETRY", {"max_retries": 0})
    server = serve(tmp_path, Refusing)
    server.status = status  # pyright: ignore
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    with caplog.at_level(logging.DEBUG), pytest.raises(StoreError, match=f"^{code}: s3://b/s.zarr/zarr.json: ") as e:
        Store("s3://b/s.zarr")
    assert e.value.__suppress_context__
    for text in (str(e.value), caplog.text):
        assert SECRET not in text and "AKIATEST" not in text
    server.shutdown()
    server.server_close()


def test_a_server_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "s.zarr", small_spec(), (5,))
    monkeypatch.setattr(Ranged, "list_directory", lambda self, path: self.send_error(404))
    server = serve(tmp_path, Ranged)
    url = f"http://127.0.0.1:{server.server_port}/s.zarr"
    with pytest.raises(StoreError, match=f"E_SCHEMA: {url}/segments lists no zarr.json: .*autoindex"):
        Store(url)
    assert len(Store(url, segments=["main-0000"]).episodes) == 1
    monkeypatch.setattr(
        Ranged, "list_directory", lambda self, path: listing(self, ["zarr.json", "x%2f..%2fy.sealed.json"])
    )
    with pytest.raises(StoreError, match=f"E_PATH: {url}/segments lists 'x/../y'"):
        Store(url)
    server.shutdown()
    server.server_close()


def listing(handler: Quiet, links: list[str]) -> None:
    page = "".join(f'<a href="{link}">x</a>' for link in links).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(page)))
    handler.end_headers()
    handler.wfile.write(page)


def test_addresses_that_are_refused(tmp_path: Path) -> None:
    for url in (f"https://me:{SECRET}@host/s.zarr", f"https://host/s.zarr?X-Amz-Signature={SECRET}"):
        with pytest.raises(ValueError, match="carries no credentials") as caught:
            open_files(url)
        assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match=r"no stores behind ftp://; .* s3://, gs://, http://, https://"):
        open_files("ftp://host/s.zarr")
    with pytest.raises(ValueError, match=r"s3://b/s.zarr: a store is written to a local disk"):
        create("s3://b/s.zarr", small_spec())  # pyright: ignore


def test_reading_needs_obstore_only_where_it_is_remote() -> None:
    code = (
        "import sys; sys.modules['obstore'] = None; sys.modules['obstore.store'] = None\n"
        "from dita.datasets.store import Store\n"
        "try: Store('s3://b/s.zarr')\n"
        "except ImportError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "remote stores need obstore: pip install 'dita[remote]'\n", out.stderr


def test_training_batches_from_s3_in_two_workers(s3: str, environment: None, tmp_path: Path) -> None:
    remote = Remote("s3", tmp_path, s3)
    make_store(remote.local, small_spec(), LENGTHS)
    remote.push()
    preprocessor = Preprocessor(contract_of([small_spec()], policy_config(cameras=2)))
    batches = {}
    for path in (remote.local, remote.url):
        dataset = WindowDataset(Store(path), n_obs_steps=2, chunk_size=6, pad_end="mask")
        sampler = MixtureSampler([len(dataset)], [1], seed=0)
        made = loader([dataset], sampler, batch_size=6, preprocess=preprocessor.batch, start_step=0, steps=3,
                      workers=2 if path == remote.url else 0)  # fmt: skip
        batches[path] = list(made)
    for here, there in zip(batches[remote.local], batches[remote.url], strict=True):
        assert torch.equal(here.observation.images, there.observation.images)
        assert torch.equal(here.observation.state, there.observation.state)
        assert torch.equal(here.actions, there.actions)


def test_inspect_verifies_a_remote_store(s3: str, environment: None, tmp_path: Path, capsys) -> None:
    remote = Remote("s3", tmp_path, s3)
    make_store(remote.local, small_spec(), (3,))
    inspect_command(remote.push(), verify=True, as_json=True, sheet=str(tmp_path / "sheet.png"))
    info = json.loads(capsys.readouterr().out)
    assert info["path"] == remote.url and info["verified"] is True and (tmp_path / "sheet.png").stat().st_size > 0
