"""Downloads from an index on loopback: what is served, refused, resumed, and said when nothing works."""

import hashlib
import random

import pytest

from fake_index import FakeIndex
from moecl.data import registry
from moecl.data.registry import download, pip_settings
from moecl.errors import AssetError

CONTENT = random.Random(0).randbytes(1_000_000)


@pytest.fixture(autouse=True)
def pip(monkeypatch):
    """No pip.conf, no PIP_* of this machine's, no pauses."""
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "CERT", "CLIENT_CERT", "PROXY"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setattr(registry, "_pip_config", lambda: "")
    monkeypatch.setattr(registry, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture
def index(monkeypatch):
    served = FakeIndex(CONTENT)
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    yield served
    served.close()


@pytest.mark.parametrize("html", [False, True])
@pytest.mark.parametrize("says", ["digest", None])
def test_download(index, tmp_path, html, says):
    index.html, index.says = html, says and index.file.sha256
    calls = []
    path = download(index.file, tmp_path, lambda *call: calls.append(call))
    assert path.read_bytes() == CONTENT
    assert calls[0] == ("connecting", 0, len(CONTENT))
    assert calls[-1] == ("downloading", len(CONTENT), len(CONTENT))
    assert sorted(calls) == calls
    assert index.asked == [""]


def test_goes_on_where_the_connection_broke(index, tmp_path):
    index.faults = ["cut"]
    assert download(index.file, tmp_path).read_bytes() == CONTENT
    assert index.asked == ["", "bytes=458752-"]  # whole chunks are kept


def test_starts_again_where_the_server_knows_no_ranges(index, tmp_path):
    index.faults, index.ranges = ["cut"], False
    assert download(index.file, tmp_path).read_bytes() == CONTENT


def test_asks_again_after_a_passing_fault(index, tmp_path):
    index.faults = [503, 429]
    assert download(index.file, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "tries"), [(403, 1), (503, 3)])
def test_gives_up(index, tmp_path, status, tries):
    index.faults = [status] * 5
    with pytest.raises(AssetError, match=f"cannot download tiny_pkg.*/simple: HTTP status {status}$"):
        download(index.file, tmp_path)
    assert len(index.asked) == tries


def test_other_bytes_are_refused_and_not_kept(index, tmp_path):
    index.content, index.says = CONTENT[::-1], None
    with pytest.raises(AssetError, match=f"served other bytes.*{hashlib.sha256(CONTENT[::-1]).hexdigest()}"):
        download(index.file, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert index.asked == [""]


def test_more_bytes_than_pinned_are_not_stored(index, tmp_path):
    index.content, index.says = CONTENT * 20, None
    with pytest.raises(AssetError, match="served other bytes"):
        download(index.file, tmp_path)


def test_another_release_under_the_same_name_is_not_downloaded(index, tmp_path):
    index.says = "0" * 64
    with pytest.raises(AssetError, match="another sha256"):
        download(index.file, tmp_path)
    assert index.asked == []


@pytest.mark.parametrize("size", [1000, len(CONTENT)])
def test_a_spoiled_part_is_thrown_away(index, tmp_path, size):
    part = download(index.file, tmp_path)
    part.write_bytes(bytes(size))  # as a power cut may leave it
    assert download(index.file, tmp_path).read_bytes() == CONTENT


def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:secret@127.0.0.1:9/simple")
    with pytest.raises(AssetError, match=r"http://127.0.0.1:9/simple: .*refused") as error:
        download(registry.PinnedFile("p", "p.whl", "0" * 64, 3), tmp_path)
    assert "secret" not in str(error.value)


def test_not_an_index(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "nowhere:simple")
    with pytest.raises(AssetError, match="nowhere:simple: not a package index"):
        download(index.file, tmp_path)


def test_login_of_the_address_is_sent(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("//", "//me:secret@"))
    download(index.file, tmp_path)
    assert index.logins[0] == "Basic bWU6c2VjcmV0"


def test_next_index(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("simple", "empty"))
    with pytest.raises(AssetError, match=r"/empty: no project tiny-pkg$"):
        download(index.file, tmp_path)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"http://127.0.0.1:9/simple {index.url}")
    assert download(index.file, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("form", [str, lambda path: path.as_uri()])
def test_a_folder_of_files(index, tmp_path, monkeypatch, form):
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", form(links))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AssetError, match=r"links: tiny_pkg-1.0-py3-none-any.whl is not there$"):
        download(index.file, tmp_path)
    (links / index.file.filename).write_bytes(CONTENT)
    assert download(index.file, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("form", [str, lambda path: path.as_uri()])
def test_an_index_in_a_folder(index, tmp_path, monkeypatch, form):
    monkeypatch.setenv("PIP_INDEX_URL", form(tmp_path / "simple"))
    page = tmp_path / "simple" / "tiny-pkg" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="../../{index.file.filename}">{index.file.filename}</a>')
    with pytest.raises(AssetError, match=r"HTTP status 404$"):
        download(index.file, tmp_path)
    (tmp_path / index.file.filename).write_bytes(CONTENT)
    assert download(index.file, tmp_path).read_bytes() == CONTENT


def test_no_source_at_all(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AssetError, match="pip is set to use no index"):
        download(index.file, tmp_path)


def test_missing_certificates(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "none.pem"))
    with pytest.raises(AssetError, match=r"PIP_CERT.*none.pem, which does not exist"):
        download(index.file, tmp_path)


def test_settings_are_pips(tmp_path, monkeypatch):
    monkeypatch.undo()
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "CERT"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    conf = tmp_path / "pip.conf"
    conf.write_text(
        "[download]\nindex-url = http://two/\n[global]\nindex-url = http://one/\nextra-index-url =\n  http://a/\n"
        "  http://b/\ncert = it's.pem\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(conf))
    registry._pip_config.cache_clear()
    settings = pip_settings()
    assert settings["index-url"] == "http://two/"
    assert settings["extra-index-url"].split()[-2:] == ["http://a/", "http://b/"]
    assert settings["cert"] == "it's.pem"
    monkeypatch.setenv("PIP_INDEX_URL", "http://three/")
    assert pip_settings()["index-url"] == "http://three/"
    registry._pip_config.cache_clear()
